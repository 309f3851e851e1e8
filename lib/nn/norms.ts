/** Norms over the last dimension. The weight may have another float dtype than the input. */
import { layerNorm, mul, rmsNorm } from '../tensor/ops.js'
import type { DType } from '../tensor/dtype.js'
import type { Tensor } from '../tensor/tensor.js'
import { tidy } from '../tensor/tidy.js'
import { ones, zeros } from './init.js'
import { checkFeatures } from './linear.js'
import type { StepRounding } from './rounding.js'
import { Module } from './module.js'
import { Parameter, type Placement } from './parameter.js'

interface Common {
  eps?: number
  dtype?: DType | undefined
  device?: Placement | undefined
}

/** A norm's result with the sum that it was taken of. */
export interface Normed {
  y: Tensor
  sum: Tensor
}

/** x / rms(x) * (weight + weightOffset). Gemma stores its weights less one: weightOffset 1. */
export class RMSNorm extends Module implements StepRounding {
  bnbExact = false
  readonly size: number
  readonly eps: number
  readonly weightOffset: number
  /** Without an offset the weight multiplies, with bnbExact, what is rounded already. Default true. */
  readonly roundsFirst: boolean
  weight: Parameter

  constructor(size: number, options: Common & { weightOffset?: number; roundsFirst?: boolean } = {}) {
    super()
    const { eps = 1e-6, weightOffset = 0, roundsFirst = true, dtype, device } = options
    this.size = checkFeatures('RMSNorm', 'size', size)
    this.eps = eps
    this.weightOffset = weightOffset
    this.roundsFirst = roundsFirst && weightOffset === 0
    this.weight = new Parameter([size], { dtype, device, init: weightOffset === 0 ? ones : zeros })
  }

  forward(x: Tensor): Tensor {
    if (!this.bnbExact || !this.roundsFirst) return rmsNorm(x, this.weight.value, this.eps, this.weightOffset)
    return tidy(() => mul(rmsNorm(x, undefined, this.eps), this.weight.value.to(x.dtype)))
  }

  /** The norm of x + residual, and x + residual, in one pass. */
  forwardSum(x: Tensor, residual: Tensor): Normed {
    return rmsNorm(x, this.weight.value, this.eps, this.weightOffset, residual)
  }
}

/** (x - mean(x)) / sqrt(var(x) + eps) * weight + bias. */
export class LayerNorm extends Module {
  readonly size: number
  readonly eps: number
  weight: Parameter | null
  bias: Parameter | null

  constructor(size: number, options: Common & { bias?: boolean; elementwiseAffine?: boolean } = {}) {
    super()
    const { eps = 1e-5, dtype, device, elementwiseAffine = true } = options
    this.size = checkFeatures('LayerNorm', 'size', size)
    this.eps = eps
    this.weight = elementwiseAffine ? new Parameter([size], { dtype, device, init: ones }) : null
    this.bias =
      elementwiseAffine && (options.bias ?? true)
        ? new Parameter([size], { dtype, device, init: zeros })
        : null
  }

  forward(x: Tensor): Tensor {
    return layerNorm(x, this.weight?.value, this.bias?.value, this.eps)
  }

  /** The norm of x + residual, and x + residual, in one pass. */
  forwardSum(x: Tensor, residual: Tensor): Normed {
    return layerNorm(x, this.weight?.value, this.bias?.value, this.eps, residual)
  }
}
