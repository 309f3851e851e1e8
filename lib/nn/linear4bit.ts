/** Linear layers with a 4-bit weight: NF4 or FP4 in blocks, statistics optionally quantised too (QLoRA, arXiv 2305.14314). */
import type { QuantState } from '../quantization/quant_state.js'
import type { QuantStorage } from '../quantization/config.js'
import { needsGrad } from '../tensor/autograd.js'
import type { Device } from '../tensor/device.js'
import { DTYPES, type DType } from '../tensor/dtype.js'
import {
  add,
  gatedActivation,
  linear4bit,
  linear4bitGated,
  linear4bitGroup,
  type Activation,
  type ExpertWeight,
  type Packed4,
  type QuantType,
} from '../tensor/ops.js'
import { checkTensor } from '../tensor/ops/call.js'
import { Tensor } from '../tensor/tensor.js'
import { streamsInPlace } from './hooks.js'
import { kaimingUniform } from './init.js'
import type { Linear } from './linear.js'
import { Parameter, place } from './parameter.js'
import { QuantizedLinear, type QuantizedLinearOptions } from './quantized_linear.js'
import { Weight4, type Weight4Options } from './weight4.js'
import { packedBytes } from './weight4_parts.js'

export interface Quantize4Options {
  /** Default 'fp4'. */
  quantType?: QuantType
  /** Elements that share an absmax. Default 64. */
  blocksize?: number
  /** Quantise the absmax too (double quantisation). Default true. */
  compressStatistics?: boolean
  /** The dtype that codes have in state dicts. Default 'uint8'. */
  quantStorage?: QuantStorage
}

export interface Linear4bitOptions extends QuantizedLinearOptions, Quantize4Options {
  /**
   * Inputs are cast to it, and results back. null (default): the input's own dtype; a first input of float32 or bfloat16
   * then fixes it for good, as in bitsandbytes.
   */
  computeDtype?: DType | null
}

export function weight4Options(options: Linear4bitOptions): Weight4Options {
  return {
    quantType: options.quantType ?? 'fp4',
    blocksize: options.blocksize ?? 64,
    compressStatistics: options.compressStatistics ?? true,
    quantStorage: options.quantStorage ?? 'uint8',
    transposed: options.transposed ?? false,
    multiplied: true,
    ...place(options),
  }
}

/**
 * y = x W^T + b with W [outFeatures, inFeatures] in 4 bits. On a GPU `weight.value` holds the codes in the order that
 * `quantState.layout` names; state dicts hold the flat order of bitsandbytes on every device.
 */
export class Linear4bit extends QuantizedLinear {
  computeDtype: DType | null
  readonly #weight: Weight4

  constructor(inFeatures: number, outFeatures: number, options: Linear4bitOptions = {}) {
    super(inFeatures, outFeatures, options)
    this.computeDtype = options.computeDtype ?? null
    this.#weight = new Weight4(outFeatures, inFeatures, this.weight, weight4Options(options))
    if (!place(options).meta) this.#weight.quantizeValues(kaimingUniform(inFeatures))
  }

  protected override makeWeight(options: ConstructorParameters<typeof Parameter>[1]): Parameter {
    const { device } = options ?? {}
    const numel = this.outFeatures * this.inFeatures
    return new Parameter([packedBytes(this.outFeatures, this.inFeatures), 1], {
      dtype: 'uint8',
      device,
      numel,
    })
  }

  /**
   * A 4-bit layer with the weight of `linear` (or Conv1D), whose bias parameter it takes over; one without memory gives
   * one without memory. `linear` keeps its weight. Should the weight hold NaN or infinities, checkFinite() says so, and
   * so does any forward() once it is known.
   */
  static fromLinear(linear: Linear, options: Omit<Linear4bitOptions, 'bias'> = {}): Linear4bit {
    const { inFeatures, outFeatures } = linear
    return new this(inFeatures, outFeatures, this.inPlaceOf(linear, options)).takeOver(linear)
  }

  /** fromLinear(), having waited for the check on NaN and infinities. */
  static async quantize(linear: Linear, options: Omit<Linear4bitOptions, 'bias'> = {}): Promise<Linear4bit> {
    return this.fromLinear(linear, options).checked()
  }

  protected override get packed(): Weight4 {
    return this.#weight
  }

  get quantType(): QuantType {
    return this.#weight.quantType
  }

  /** How the weight is packed; undefined before it is loaded. */
  get quantState(): QuantState | undefined {
    return this.#weight.state
  }

  /** @internal The dtype to compute in. A first input may fix it. */
  computeDtypeFor(x: Tensor): DType {
    checkTensor('Linear4bit', 'x', x)
    if (this.computeDtype === null && x.dtype !== 'float16' && DTYPES[x.dtype].isFloat) {
      this.computeDtype = x.dtype
    }
    return this.computeDtype ?? x.dtype
  }

  /**
   * The layers as operands of one product with x, or undefined where they are to be called one by one: layers of another
   * kind, with a forward() of their own, or that compute in another dtype than x's; and where gradients are wanted.
   */
  static #together(
    x: Tensor,
    layers: readonly Linear[],
  ): { weights: Packed4[]; biases: (Tensor | undefined)[] } | undefined {
    const plain = layers.filter(
      (layer): layer is Linear4bit =>
        layer instanceof Linear4bit &&
        (layer.forward === Linear4bit.prototype.forward || streamsInPlace(layer, x)),
    )
    if (plain.length < layers.length || plain.some((layer) => layer.computeDtypeFor(x) !== x.dtype))
      return undefined
    if (needsGrad(x, ...plain.map((layer) => layer.bias?.value))) return undefined
    return {
      weights: plain.map((layer) => layer.#weight.operand(layer.toString())),
      biases: plain.map((layer) => layer.bias?.value),
    }
  }

  /** forward() of each layer for one x (q, k and v), in one launch where the device has a kernel for that. */
  static forwardGroup(x: Tensor, layers: readonly Linear[]): Tensor[] {
    const together = this.#together(x, layers)
    if (!together) return layers.map((layer) => layer.forward(x))
    return linear4bitGroup(x, together.weights, together.biases)
  }

  /** activation(gate.forward(x)) * up.forward(x), likewise. */
  static forwardGated(x: Tensor, gate: Linear, up: Linear, activation: Activation): Tensor {
    const together = this.#together(x, [gate, up])
    if (!together) return gatedActivation(gate.forward(x), up.forward(x), activation)
    const [first, second] = together.weights as [Packed4, Packed4]
    return linear4bitGated(x, first, second, activation, [together.biases[0], together.biases[1]])
  }

  override expertWeight(): ExpertWeight {
    return { kind: '4bit', weight: this.#weight.operand(this.toString()), bias: this.bias?.value }
  }

  override forwardOn(device: Device, x: Tensor, residual?: Tensor): Tensor {
    this.computeDtypeFor(x)
    return super.forwardOn(device, x, residual)
  }

  override forward(x: Tensor, residual?: Tensor): Tensor {
    const weight = this.#weight.operand(this.toString())
    const compute = this.computeDtypeFor(x)
    const bias = this.bias?.value
    if (compute === x.dtype) return linear4bit(x, weight, { bias, residual })
    const cast = x.to(compute)
    const wide = linear4bit(cast, weight, { bias })
    const y = wide.to(x.dtype)
    cast.dispose()
    wide.dispose()
    if (!residual) return y
    const sum = add(y, residual)
    y.dispose()
    return sum
  }

  protected override twin(): Linear4bit {
    const { inFeatures, outFeatures, computeDtype, transposed } = this
    return new Linear4bit(inFeatures, outFeatures, { computeDtype, transposed, bias: false, device: 'meta' })
  }

  protected override copyWeight(from: Linear4bit, device: Device): void {
    this.#weight.copy(from.#weight, device)
  }
}

export class LinearNF4 extends Linear4bit {
  constructor(inFeatures: number, outFeatures: number, options: Omit<Linear4bitOptions, 'quantType'> = {}) {
    super(inFeatures, outFeatures, { ...options, quantType: 'nf4' })
  }
}

export class LinearFP4 extends Linear4bit {
  constructor(inFeatures: number, outFeatures: number, options: Omit<Linear4bitOptions, 'quantType'> = {}) {
    super(inFeatures, outFeatures, { ...options, quantType: 'fp4' })
  }
}
