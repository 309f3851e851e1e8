/** Dense linear layers. */
import { HalfbyteError } from '../errors.js'
import { noGrad } from '../tensor/autograd.js'
import { linear, type ExpertWeight } from '../tensor/ops.js'
import type { Device } from '../tensor/device.js'
import type { DType } from '../tensor/dtype.js'
import type { Tensor } from '../tensor/tensor.js'
import { tidy } from '../tensor/tidy.js'
import { kaimingUniform } from './init.js'
import { Module } from './module.js'
import { laidTransposed, moved } from './moving.js'
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

/** The tensor on a device, as one of its own. */
function copied(tensor: Tensor, device: Device): Tensor {
  const there = moved(tensor, { device })
  return there === tensor ? tensor.share() : there
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

  /** @internal The layer as one of many experts; undefined where it can only be called. */
  expertWeight(): ExpertWeight | undefined {
    return { kind: 'dense', weight: this.weight.value, bias: this.bias?.value }
  }

  /** A layer of the same kind without bias and without memory. */
  protected twin(): Linear {
    return new Linear(this.inFeatures, this.outFeatures, { bias: false, device: 'meta' })
  }

  /** The layer on a device, with tensors of its own. */
  copyTo(device: Device): Linear {
    const made = this.twin()
    made.copyWeight(this, device)
    if (this.bias) {
      // as it is: gradients go back through the copy
      made.bias = new Parameter(this.bias.shape, { device: 'meta' })
      made.bias.replace(copied(this.bias.value, device))
    }
    return made
  }

  /** Takes a copy of the weight of a layer of the same kind. */
  protected copyWeight(from: Linear, device: Device): void {
    this.weight.replace(copied(from.weight.value, device))
  }

  /** forward() on another device, with a copy of the layer for the time of the call. The result is where x is. */
  forwardOn(device: Device, x: Tensor, residual?: Tensor): Tensor {
    const there = this.copyTo(device)
    try {
      return tidy(() => {
        const y = there.forward(x.to(device), residual?.to(device))
        return y.to(x.device)
      })
    } finally {
      there.dispose()
    }
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
  override expertWeight(): undefined {
    return undefined
  }

  protected override twin(): Conv1D {
    return new Conv1D(this.inFeatures, this.outFeatures, { bias: false, device: 'meta' })
  }

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
    const stored = noGrad(() => tidy(() => laidTransposed(tensor.to({ dtype, device }))))
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
