/** Dense linear layers. */
import { HalfbyteError } from '../errors.js'
import { linear } from '../tensor/ops.js'
import type { DType } from '../tensor/dtype.js'
import type { Tensor } from '../tensor/tensor.js'
import { tidy } from '../tensor/tidy.js'
import { kaimingUniform } from './init.js'
import { Module } from './module.js'
import { laidTransposed } from './moving.js'
import { Parameter, type Placement } from './parameter.js'

export interface LinearLayerOptions {
  /** Default true. */
  bias?: boolean
  dtype?: DType | undefined
  device?: Placement | undefined
}

/** A feature count that a layer can have, else ERR_HALFBYTE_SHAPE. */
export function checkFeatures(layer: string, name: string, n: number): number {
  if (Number.isSafeInteger(n) && n > 0) return n
  throw new HalfbyteError(
    'ERR_HALFBYTE_SHAPE',
    `${layer}: ${name} is ${n}, it must be a positive whole number`,
  )
}

/** y = x W^T + b for x [..., inFeatures]; weight [outFeatures, inFeatures]. First values: Kaiming uniform. */
export class Linear extends Module {
  readonly inFeatures: number
  readonly outFeatures: number
  weight: Parameter
  bias: Parameter | null

  constructor(inFeatures: number, outFeatures: number, options: LinearLayerOptions = {}) {
    super()
    this.inFeatures = checkFeatures(new.target.name, 'inFeatures', inFeatures)
    this.outFeatures = checkFeatures(new.target.name, 'outFeatures', outFeatures)
    const init = kaimingUniform(inFeatures)
    this.weight = this.makeWeight({ ...options, init })
    this.bias = (options.bias ?? true) ? new Parameter([outFeatures], { ...options, init }) : null
  }

  /** The place of the weight: subclasses have other layouts. */
  protected makeWeight(options: ConstructorParameters<typeof Parameter>[1]): Parameter {
    return new Parameter([this.outFeatures, this.inFeatures], options)
  }

  /** `residual`, of the result's shape and x's dtype, is added in the same pass. */
  forward(x: Tensor, residual?: Tensor): Tensor {
    return linear(x, this.weight.value, { bias: this.bias?.value, residual })
  }

  override toString(): string {
    return `${this.constructor.name}(${this.inFeatures}, ${this.outFeatures}${this.bias ? '' : ', no bias'})`
  }
}

/**
 * GPT-2's linear layer: the same product with the weight given as [inFeatures, outFeatures]. It lies in memory the other
 * way round, as the product wants it.
 */
export class Conv1D extends Linear {
  protected override makeWeight(options: ConstructorParameters<typeof Parameter>[1]): Parameter {
    const weight = new Parameter([this.inFeatures, this.outFeatures], options)
    const drawn = weight.tensor
    if (drawn) {
      weight.replace(laidTransposed(drawn))
      if (weight.tensor !== drawn) drawn.dispose()
    }
    return weight
  }

  override async ownLoad(name: string, tensor: Tensor): Promise<void> {
    if (name !== 'weight' || this.weight.reject(tensor)) return super.ownLoad(name, tensor)
    const { dtype = tensor.dtype, device = tensor.device } = this.weight
    const stored = tidy(() => laidTransposed(tensor.to({ dtype, device })))
    if (stored !== tensor) tensor.dispose()
    return super.ownLoad(name, stored)
  }

  override forward(x: Tensor, residual?: Tensor): Tensor {
    const turned = this.weight.value.transpose(0, 1)
    try {
      return linear(x, turned, { bias: this.bias?.value, residual })
    } finally {
      turned.dispose()
    }
  }
}
