/**
 * The weight of an LLM.int8() layer: int8 rows in a parameter [n, k], and their absmax SCB float32 [n]. A float weight
 * is rounded to float16 and quantised when it arrives; one that is quantised already arrives as 'weight' and 'SCB' (and
 * 'weight_format', which must say rows). With keepFloat the weight stays as it is and is quantised for each product.
 */
import { HalfbyteError } from '../errors.js'
import { noGrad } from '../tensor/autograd.js'
import { device as toDevice, type Device } from '../tensor/device.js'
import { DTYPES, type DType } from '../tensor/dtype.js'
import { int8DequantizeRows, int8QuantizeRows } from '../tensor/ops.js'
import { Tensor } from '../tensor/tensor.js'
import { keep, tidy } from '../tensor/tidy.js'
import { FiniteCheck } from './finite.js'
import { firstValues, type Init } from './init.js'
import type { Parameter } from './parameter.js'
import { onDevice, type QuantizedWeight } from './packed.js'
import { entryOf, type OwnProblems, type StateEntry } from './state_dict.js'

export interface Weight8Options {
  keepFloat: boolean
  /** Float weights arrive as [k, n]. */
  transposed: boolean
  dtype?: DType | undefined
  device?: Device | undefined
}

interface Int8Operand {
  codes: Tensor
  scb: Tensor
  /** The float weight that the codes were made from, with keepFloat. */
  source?: Tensor
}

const PARTS = ['weight', 'SCB', 'weight_format']

export class Weight8 implements QuantizedWeight {
  readonly n: number
  readonly k: number
  /** int8 codes, or the float weight with keepFloat. */
  readonly place: Parameter
  readonly #finite = new FiniteCheck()
  /** Of the float weight, when it is known. */
  sourceDtype: DType | undefined
  readonly #options: Weight8Options
  #scb: Tensor | undefined
  #parts = new Map<string, Tensor>()

  constructor(n: number, k: number, place: Parameter, options: Weight8Options) {
    this.n = n
    this.k = k
    this.place = place
    this.#options = options
    this.sourceDtype = options.dtype
  }

  get scb(): Tensor | undefined {
    return this.#scb
  }

  get isLoaded(): boolean {
    return this.place.isLoaded && (this.#options.keepFloat || this.#scb !== undefined)
  }

  /** The shape in which a float weight arrives. */
  get #floatShape(): [number, number] {
    return this.#options.transposed ? [this.k, this.n] : [this.n, this.k]
  }

  /** Runs `use` with the codes and their absmax; made for the occasion with keepFloat. */
  with<T>(layer: string, use: (operand: Int8Operand) => T): T {
    const value = this.place.value
    this.#finite.refuse(this.place.path || layer)
    if (!this.#options.keepFloat) return use({ codes: value, scb: this.#scb! })
    const { codes, rowAbsmax } = noGrad(() => int8QuantizeRows(value, 0, true))
    try {
      return use({ codes, scb: rowAbsmax, source: value })
    } finally {
      codes.dispose()
      rowAbsmax.dispose()
    }
  }

  /** The float values [n, k]; default dtype: the source's, else float16. */
  dequantize(dtype?: DType): Tensor {
    const { value } = this.place
    if (!this.#options.keepFloat) {
      return int8DequantizeRows(value, this.#scb!, dtype ?? this.sourceDtype ?? 'float16')
    }
    return noGrad(() => (dtype === undefined || value.dtype === dtype ? value.share() : value.to(dtype)))
  }

  // -- loading

  accepts(name: string): boolean {
    return PARTS.includes(name)
  }

  missing(): string[] {
    if (this.#parts.size > 0) return ['weight', 'SCB'].filter((name) => !this.#parts.has(name))
    return this.isLoaded ? [] : ['weight']
  }

  problems(own: ReadonlyMap<string, Tensor>): OwnProblems {
    const wrong = PARTS.flatMap((name) => {
      const tensor = own.get(name)
      const problem = tensor && this.#reject(name, tensor)
      return problem ? [{ name, problem }] : []
    })
    const missing = own.has('weight') ? [] : ['weight']
    if (own.get('weight')?.dtype === 'int8' && !own.has('SCB')) missing.push('SCB')
    return { missing, unexpected: [], wrong }
  }

  #reject(name: string, tensor: Tensor): string | undefined {
    const shape = `${tensor.dtype} [${tensor.shape.join(', ')}]`
    if (name === 'SCB') {
      if (this.#options.keepFloat) return 'is given, but the weight of this layer stays in float'
      return tensor.dtype === 'float32' && tensor.size === this.n
        ? undefined
        : `is ${shape}, it must be float32 [${this.n}]`
    }
    if (name === 'weight_format') {
      return tensor.dtype === 'uint8' && tensor.size === 1
        ? undefined
        : `is ${shape}; only the number of the row format, as uint8, is known`
    }
    const isFloat = DTYPES[tensor.dtype].isFloat
    const wanted = isFloat ? this.#floatShape : [this.n, this.k]
    if (tensor.ndim !== 2 || tensor.shape[0] !== wanted[0] || tensor.shape[1] !== wanted[1]) {
      return `is ${shape}, the model has [${wanted.join(', ')}]`
    }
    if (isFloat || (tensor.dtype === 'int8' && !this.#options.keepFloat)) return undefined
    return `is ${tensor.dtype}, it must be ${this.#options.keepFloat ? 'float' : 'float or int8'}`
  }

  async load(name: string, tensor: Tensor): Promise<void> {
    const problem = this.#reject(name, tensor)
    if (problem) {
      tensor.dispose()
      throw new HalfbyteError('ERR_HALFBYTE_STATE_DICT', `${this.place.path || 'weight'}: ${name} ${problem}`)
    }
    if (name === 'weight_format') return this.#checkFormat(tensor)
    this.place.refuseOffloaded(tensor)
    const target = this.place.device ?? this.#options.device ?? tensor.device
    const here = keep(tensor.to(target))
    if (here !== tensor) tensor.dispose()
    if (name === 'weight' && here.dtype !== 'int8') {
      try {
        this.quantize(here)
      } finally {
        here.dispose()
      }
      return
    }
    const part = name === 'SCB' && here.ndim !== 1 ? keep(here.reshape(this.n)) : here
    if (part !== here) here.dispose()
    this.#parts.get(name)?.dispose()
    this.#parts.set(name, part)
    const codes = this.#parts.get('weight')
    const scb = this.#parts.get('SCB')
    if (!codes || !scb) return
    this.#parts = new Map()
    this.#finite.begin(scb)
    this.#replace(codes, scb)
  }

  /** Quantises a float weight, which stays the caller's. */
  quantize(weight: Tensor): void {
    noGrad(() => this.#quantize(weight))
  }

  #quantize(weight: Tensor): void {
    const { keepFloat, transposed, dtype } = this.#options
    this.sourceDtype = dtype ?? weight.dtype
    if (keepFloat) {
      const kept = tidy(() => {
        const turned = transposed ? weight.transpose(0, 1) : weight
        const copy = Tensor.empty([this.n, this.k], this.sourceDtype, weight.device)
        return copy.copyFrom(turned)
      })
      this.#finite.begin(kept)
      this.#replace(kept, undefined)
      return
    }
    const rows = tidy(() => {
      const turned = (transposed ? weight.transpose(0, 1) : weight).contiguous()
      const made = int8QuantizeRows(turned, 0, true)
      // what is finite may still overflow in float16: then SCB is infinite
      this.#finite.begin(turned, made.rowAbsmax)
      return made
    })
    this.#replace(rows.codes, rows.rowAbsmax)
  }

  /** Becomes a copy of another weight, on a device. */
  copy(from: Weight8, device: Device): void {
    this.sourceDtype = from.sourceDtype
    this.#replace(onDevice(from.place.value, device), from.#scb && onDevice(from.#scb, device))
  }

  /** Quantises first values of [n, k]. */
  quantizeValues(init: Init): void {
    using values = firstValues(init, this.#floatShape, this.#options.device)
    this.quantize(values)
  }

  async #checkFormat(tensor: Tensor): Promise<void> {
    const format = await tensor.item().finally(() => tensor.dispose())
    if (format === 0) return
    throw new HalfbyteError(
      'ERR_HALFBYTE_STATE_DICT',
      `${this.place.path || 'weight'}: weight_format ${format} is a layout of old GPUs; only rows (0) can be read. ` +
        'Save the checkpoint again with a recent bitsandbytes',
    )
  }

  #replace(value: Tensor, scb: Tensor | undefined): void {
    this.place.tensor?.dispose()
    this.#scb?.dispose()
    this.place.replace(value)
    this.#scb = scb && keep(scb)
  }

  // -- state

  *statistics(): IterableIterator<[string, Tensor]> {
    if (this.#scb) yield ['SCB', this.#scb]
  }

  entries(): Promise<[string, StateEntry][]> {
    const weight: [string, StateEntry] = ['weight', this.place.stateEntry()]
    const scb = this.#scb
    if (!scb) return Promise.resolve([weight])
    const device = this.place.isOffloaded ? toDevice('cpu') : scb.device
    return Promise.resolve([
      weight,
      ['SCB', { ...entryOf(scb), read: () => onDevice(scb, device) }],
      [
        'weight_format',
        {
          dtype: 'uint8',
          shape: [],
          key: this.#options,
          read: () => Tensor.from(Uint8Array.of(0), { shape: [], device }),
        },
      ],
    ])
  }

  nonfinite(): Promise<number> {
    return this.#finite.count()
  }

  castRefusal(): string | undefined {
    if (this.#options.keepFloat) return undefined
    return 'whose int8 weight has no float dtype to change; dequantize() the model first, or load it with another dtype'
  }

  offload(read: (name: string, on?: Device) => Tensor): void {
    this.place.offload({ bringIn: () => read('weight'), read: (on) => read('weight', on) })
  }

  bringIn(): void {
    this.place.bringIn()
  }

  release(): void {
    this.place.release()
  }

  move(device: Device): void {
    this.#options.device = device
    if (!this.#scb || this.#scb.device === device) return
    const moved = keep(this.#scb.to(device))
    this.#scb.dispose()
    this.#scb = moved
  }

  dispose(): void {
    this.place.dispose()
    this.#scb?.dispose()
    this.#scb = undefined
    for (const tensor of this.#parts.values()) tensor.dispose()
    this.#parts.clear()
  }
}
