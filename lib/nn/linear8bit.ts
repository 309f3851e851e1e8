/** The LLM.int8() linear layer (arXiv 2208.07339). */
import type { Device } from '../tensor/device.js'
import { linear8bit, type ExpertWeight } from '../tensor/ops.js'
import type { Tensor } from '../tensor/tensor.js'
import { kaimingUniform } from './init.js'
import type { Linear } from './linear.js'
import { Parameter, place } from './parameter.js'
import { QuantizedLinear, type QuantizedLinearOptions } from './quantized_linear.js'
import { Weight8 } from './weight8.js'

export interface Linear8bitOptions extends QuantizedLinearOptions {
  /** Input columns with an element of at least this magnitude are multiplied in the input's precision. Default 0: none. */
  threshold?: number
  /** The weight stays in its float dtype and is quantised in each forward. Default false. */
  hasFp16Weights?: boolean
  /** bitsandbytes' float16 roundings of input, product and output. Default false. */
  bnbExact?: boolean
}

/** y = x W^T + b with W [outFeatures, inFeatures] as int8 rows and x quantised by rows on the way in. */
export class Linear8bit extends QuantizedLinear {
  threshold: number
  bnbExact: boolean
  readonly hasFp16Weights: boolean
  readonly #weight: Weight8

  constructor(inFeatures: number, outFeatures: number, options: Linear8bitOptions = {}) {
    super(inFeatures, outFeatures, options)
    this.threshold = options.threshold ?? 0
    this.bnbExact = options.bnbExact ?? false
    this.hasFp16Weights = options.hasFp16Weights ?? false
    // the base class has made a place for codes
    if (this.hasFp16Weights) this.weight = new Parameter([outFeatures, inFeatures], options)
    const { meta, dtype, device } = place(options)
    this.#weight = new Weight8(outFeatures, inFeatures, this.weight, {
      keepFloat: this.hasFp16Weights,
      transposed: this.transposed,
      dtype,
      device,
    })
    if (!meta) this.#weight.quantizeValues(kaimingUniform(inFeatures))
  }

  protected override makeWeight(options: ConstructorParameters<typeof Parameter>[1]): Parameter {
    const { device } = options ?? {}
    return new Parameter([this.outFeatures, this.inFeatures], { dtype: 'int8', device })
  }

  /** Like Linear4bit.fromLinear(). */
  static fromLinear(linear: Linear, options: Omit<Linear8bitOptions, 'bias'> = {}): Linear8bit {
    const { inFeatures, outFeatures } = linear
    const made = new this(inFeatures, outFeatures, this.inPlaceOf(linear, options))
    if (made.hasFp16Weights) made.weight.requiresGrad = linear.weight.requiresGrad
    return made.takeOver(linear)
  }

  /** fromLinear(), having waited for the check on NaN and infinities. */
  static async quantize(linear: Linear, options: Omit<Linear8bitOptions, 'bias'> = {}): Promise<Linear8bit> {
    return this.fromLinear(linear, options).checked()
  }

  protected override get packed(): Weight8 {
    return this.#weight
  }

  /** Row absmax float32 [outFeatures]; undefined before the weight is loaded, and with hasFp16Weights. */
  get scb(): Tensor | undefined {
    return this.#weight.scb
  }

  override forward(x: Tensor, residual?: Tensor): Tensor {
    const { threshold, bnbExact } = this
    return this.#weight.with(this.toString(), ({ codes, scb, source }) =>
      linear8bit(x, codes, scb, { bias: this.bias?.value, residual, threshold, bnbExact, source }),
    )
  }

  override expertWeight(): ExpertWeight | undefined {
    if (this.hasFp16Weights) return undefined
    const { threshold, bnbExact } = this
    return this.#weight.with(this.toString(), ({ codes, scb }) => {
      return { kind: 'int8', weight: codes, scb, threshold, bnbExact, bias: this.bias?.value }
    })
  }

  protected override twin(): Linear8bit {
    const { inFeatures, outFeatures, threshold, bnbExact, hasFp16Weights, transposed } = this
    return new Linear8bit(inFeatures, outFeatures, {
      threshold,
      bnbExact,
      hasFp16Weights,
      transposed,
      bias: false,
      device: 'meta',
    })
  }

  protected override copyWeight(from: Linear8bit, device: Device): void {
    this.#weight.copy(from.#weight, device)
  }
}
