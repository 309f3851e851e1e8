/** What linear layers with a packed weight have in common, in 4 bits and in 8. */
import type { DType } from '../tensor/dtype.js'
import type { Tensor } from '../tensor/tensor.js'
import { Conv1D, Linear, type LinearLayerOptions } from './linear.js'
import type { PackedWeight, QuantizedWeight } from './packed.js'

export interface QuantizedLinearOptions extends LinearLayerOptions {
  /** Float weights are given as [inFeatures, outFeatures], as Conv1D has them. */
  transposed?: boolean
}

export abstract class QuantizedLinear extends Linear {
  readonly transposed: boolean

  constructor(inFeatures: number, outFeatures: number, options: QuantizedLinearOptions = {}) {
    super(inFeatures, outFeatures, options)
    this.transposed = options.transposed ?? false
  }

  /** The weight, of which the parameter holds the codes. */
  protected abstract get packed(): QuantizedWeight

  /** The options of a layer, without memory as yet, that is to takeOver() what `linear` has. */
  protected static inPlaceOf<Options extends object>(linear: Linear, options: Options) {
    return {
      dtype: linear.weight.dtype,
      ...options,
      transposed: linear instanceof Conv1D,
      bias: false,
      device: 'meta',
    } as const
  }

  /** Takes over the bias parameter of `linear`, and packs its weight, which it keeps. */
  protected takeOver(linear: Linear): this {
    this.bias = linear.bias
    this.training = linear.training
    this.weight.retarget({ device: linear.weight.device })
    if (linear.weight.isLoaded) this.packed.quantize(linear.weight.value)
    return this
  }

  /** Itself, having waited for the check on NaN and infinities; without a weight where there are any. */
  protected async checked(): Promise<this> {
    try {
      await this.checkFinite()
    } catch (error) {
      this.packed.dispose()
      throw error
    }
    return this
  }

  /** The weight's values [outFeatures, inFeatures]; default dtype: that of the weight before it was quantised. */
  dequantizeWeight(dtype?: DType): Tensor {
    return this.packed.dequantize(dtype)
  }

  override *ownPacked(): IterableIterator<PackedWeight> {
    yield this.packed
  }
}
