/**
 * The weight of a 4-bit layer: packed codes in a parameter of shape [ceil(n k / 2), 1], the statistics in a QuantState,
 * both in the layout that their device multiplies with.
 * A float weight [n, k] is quantised when it arrives. A weight that is quantised already arrives in parts, in any order:
 *   weight                                      uint8 [ceil(n k / 2), 1], or as many bytes of another storage dtype
 *   weight.absmax                               float32 [blocks], or uint8 [blocks] when double-quantised, and then also
 *   weight.nested_absmax, .nested_quant_map     float32 [ceil(blocks / 256)], float32 [256]
 *   weight.quant_map                            float32 [16]
 *   weight.quant_state.bitsandbytes__nf4|fp4    uint8, JSON
 */
import { HalfbyteError } from '../errors.js'
import { quantize4bit } from '../quantization/functional.js'
import { QuantState } from '../quantization/quant_state.js'
import { device as toDevice, type Device } from '../tensor/device.js'
import { DTYPES, type DType } from '../tensor/dtype.js'
import { bestLayout4, dequantizeBlocks4, type Packed4, type QuantType } from '../tensor/ops.js'
import { Tensor } from '../tensor/tensor.js'
import { keep, tidy } from '../tensor/tidy.js'
import { FiniteCheck } from './finite.js'
import type { Init } from './init.js'
import { onDevice, type PackedWeight } from './packed.js'
import type { Parameter } from './parameter.js'
import { entryOf, type OwnProblems, type StateEntry } from './state_dict.js'

export interface Weight4Options {
  quantType: QuantType
  blocksize: number
  /** Quantise the statistics as well. */
  compressStatistics: boolean
  /** The dtype of the codes in state dicts. */
  quantStorage: DType
  /** Float weights arrive as [k, n]. */
  transposed: boolean
  /** Whether it is multiplied with, so that the device's layout pays. */
  multiplied: boolean
  /** Float weights are rounded to it before they are quantised. */
  dtype?: DType | undefined
  device?: Device | undefined
}

const PLAIN = ['absmax', 'quant_map']
const NESTED = ['nested_absmax', 'nested_quant_map']
const STATE = /^quant_state\.bitsandbytes__(nf4|fp4)$/

export function packedBytes(n: number, k: number): number {
  return Math.ceil((n * k) / 2)
}

/** Bytes of the statistics of a packed weight [n, k], code tables included. */
export function statisticsBytes(n: number, k: number, blocksize: number, nested: boolean): number {
  const blocks = Math.ceil((n * k) / blocksize)
  return 4 * 16 + (nested ? blocks + 4 * Math.ceil(blocks / 256) + 4 * 256 + 4 : 4 * blocks)
}

/** Packed codes of whatever storage dtype as uint8 [bytes, 1]. */
function asBytes(weight: Tensor): Tensor {
  return tidy(() => keep(weight.reshape(-1).bitcast('uint8').reshape(-1, 1)))
}

export class Weight4 implements PackedWeight {
  readonly n: number
  readonly k: number
  readonly codes: Parameter
  readonly #finite = new FiniteCheck()
  readonly #options: Weight4Options
  #state: QuantState | undefined
  #operand: Packed4 | undefined
  #parts = new Map<string, Tensor>()
  /** Of the state dict's entries that are made when they are read. */
  readonly #keys = { weight: {}, absmax: {}, values: {} }
  /** What stays of the state of an offloaded weight. */
  #kept: QuantState | undefined
  #read: ((name: string, on?: Device) => Tensor) | undefined

  constructor(n: number, k: number, codes: Parameter, options: Weight4Options) {
    this.n = n
    this.k = k
    this.codes = codes
    this.#options = options
  }

  get isLoaded(): boolean {
    return this.#read !== undefined || (this.#state !== undefined && this.codes.isLoaded)
  }

  get state(): QuantState | undefined {
    return this.#state
  }

  /** What the ops take; an error while there is nothing, or when NaN was found. */
  operand(layer: string): Packed4 {
    const codes = this.codes.value
    this.#finite.refuse(this.codes.path || layer)
    if (this.#operand?.codes !== codes) this.#operand = this.#state!.packed(codes)
    return this.#operand
  }

  get quantType(): QuantType {
    return this.#state?.quantType ?? this.#options.quantType
  }

  /** The float values [n, k]; default dtype: that of the weight before it was quantised. */
  dequantize(dtype?: DType): Tensor {
    const codes = this.codes.value
    return dequantizeBlocks4(this.#state!.packed(codes), dtype ?? this.#state!.dtype)
  }

  // -- loading

  #isFloatWeight(tensor: Tensor): boolean {
    const [rows, cols] = this.#options.transposed ? [this.k, this.n] : [this.n, this.k]
    return (
      DTYPES[tensor.dtype].isFloat &&
      tensor.ndim === 2 &&
      tensor.shape[0] === rows &&
      tensor.shape[1] === cols
    )
  }

  accepts(name: string): boolean {
    if (name === 'weight') return true
    const part = name.startsWith('weight.') ? name.slice('weight.'.length) : ''
    return PLAIN.includes(part) || NESTED.includes(part) || STATE.test(part)
  }

  /** Names of parts that are needed besides those that are there. */
  #lacking(there: ReadonlyMap<string, Tensor>): string[] {
    const weight = there.get('weight')
    if (weight && this.#isFloatWeight(weight)) return []
    const nested = there.get('weight.absmax')?.dtype === 'uint8'
    const names = ['weight', ...[...PLAIN, ...(nested ? NESTED : [])].map((part) => `weight.${part}`)]
    const lacking = names.filter((name) => !there.has(name))
    if (![...there.keys()].some((name) => STATE.test(name.slice('weight.'.length)))) {
      lacking.push(`weight.quant_state.bitsandbytes__${this.#options.quantType}`)
    }
    return lacking
  }

  missing(): string[] {
    if (this.#parts.size > 0) return this.#lacking(this.#parts)
    return this.isLoaded ? [] : ['weight']
  }

  /** Complaints about the part of a state dict that is this weight's. */
  problems(own: ReadonlyMap<string, Tensor>): OwnProblems {
    const there = new Map([...own].filter(([name]) => this.accepts(name)))
    if (there.size === 0) return { missing: ['weight'], unexpected: [], wrong: [] }
    const wrong = [...there].flatMap(([name, tensor]) => {
      const problem = this.#reject(name, tensor)
      return problem ? [{ name, problem }] : []
    })
    return { missing: this.#lacking(there), unexpected: [], wrong }
  }

  #reject(name: string, tensor: Tensor): string | undefined {
    if (name === 'weight') {
      if (this.#isFloatWeight(tensor) || tensor.nbytes === packedBytes(this.n, this.k)) return undefined
      return (
        `is ${tensor.dtype} [${tensor.shape.join(', ')}]; the model takes float [${this.n}, ${this.k}]` +
        `${this.#options.transposed ? ' transposed' : ''}, or ${packedBytes(this.n, this.k)} packed bytes`
      )
    }
    const wanted: Record<string, [DType[], number?]> = {
      'weight.absmax': [['float32', 'uint8']],
      'weight.quant_map': [['float32'], 16],
      'weight.nested_absmax': [['float32']],
      'weight.nested_quant_map': [['float32'], 256],
    }
    const [dtypes, size] = wanted[name] ?? [['uint8' as const]]
    if (!dtypes.includes(tensor.dtype)) return `is ${tensor.dtype}, it must be ${dtypes.join(' or ')}`
    if (size !== undefined && tensor.size !== size) return `has ${tensor.size} entries, it must have ${size}`
    return undefined
  }

  /** Takes over one tensor. Float weights are quantised at once; parts wait for the last of them. */
  async load(name: string, tensor: Tensor): Promise<void> {
    this.codes.refuseOffloaded(tensor)
    const problem = this.#reject(name, tensor)
    if (problem) {
      tensor.dispose()
      throw new HalfbyteError('ERR_HALFBYTE_STATE_DICT', `${this.codes.path || name} ${problem}`)
    }
    const target = this.codes.device ?? this.#options.device ?? tensor.device
    const here = keep(tensor.to(target))
    if (here !== tensor) tensor.dispose()
    if (name === 'weight' && this.#isFloatWeight(here)) {
      try {
        this.quantize(here)
      } finally {
        here.dispose()
      }
      return
    }
    this.#parts.get(name)?.dispose()
    this.#parts.set(name, here)
    if (this.#lacking(this.#parts).length > 0) return
    const parts = this.#parts
    this.#parts = new Map()
    await this.#assemble(parts)
  }

  /** Packs a float weight, which stays the caller's. */
  quantize(weight: Tensor): void {
    const { quantType, blocksize, compressStatistics, transposed, dtype } = this.#options
    tidy(() => {
      const plain = weight.detach()
      const turned = transposed ? plain.transpose(0, 1) : plain
      const source = turned.to(dtype ?? turned.dtype).contiguous()
      this.#finite.begin(source)
      const { codes, state } = quantize4bit(source, { quantType, blocksize, compressStatistics })
      this.#replace(codes, state)
    })
    this.#arrange()
  }

  async #assemble(parts: Map<string, Tensor>): Promise<void> {
    const where = this.codes.path || 'weight'
    const weight = parts.get('weight')!
    parts.delete('weight')
    try {
      const state = await QuantState.fromDict(
        new Map([...parts].map(([name, tensor]) => [name.slice('weight.'.length), tensor])),
      )
      const [n, k] = state.shape
      if (state.shape.length !== 2 || n !== this.n || k !== this.k) {
        throw new HalfbyteError(
          'ERR_HALFBYTE_STATE_DICT',
          `${where}: its quant_state says shape [${state.shape.join(', ')}], the model has [${this.n}, ${this.k}]`,
        )
      }
      const bytes = asBytes(weight)
      this.#finite.begin(state.state2?.absmax ?? state.absmax)
      this.#replace(bytes, state)
      this.#arrange()
    } finally {
      for (const tensor of parts.values()) tensor.dispose()
      weight.dispose()
    }
  }

  /** Becomes a copy of another weight, on a device and in its layout. */
  copy(from: Weight4, device: Device): void {
    from.#finite.refuse(from.codes.path)
    this.#replace(onDevice(from.codes.value, device), from.#state!.to(device))
    this.#arrange()
  }

  /** Packs first values of [n, k]. */
  quantizeValues(init: Init): void {
    const shape = this.#options.transposed ? [this.k, this.n] : [this.n, this.k]
    const on = this.#options.device
    const values = Tensor.from(init(shape), { shape, ...(on && { device: on }) })
    this.quantize(values)
    values.dispose()
  }

  #replace(codes: Tensor, state: QuantState): void {
    this.codes.tensor?.dispose()
    this.codes.replace(codes)
    this.#letGo()
    this.#state = state
  }

  /** Brings codes and statistics into the layout of their device. */
  #arrange(): void {
    const codes = this.codes.tensor
    const state = this.#state
    if (!codes || !state) return
    const { multiplied } = this.#options
    const layout = multiplied ? bestLayout4(codes.device, this.n, this.k, state.blocksize) : 'flat'
    if (state.layout === layout) return
    const arranged = state.withLayout(codes, layout)
    this.codes.rearrange(arranged.codes)
    this.#letGo()
    this.#state = arranged.state
  }

  // -- state

  *statistics(): IterableIterator<[string, Tensor]> {
    const state = this.#state ?? this.#kept
    if (!state) return
    yield ['weight.absmax', state.absmax]
    yield ['weight.quant_map', state.code]
    if (!state.state2) return
    yield ['weight.nested_absmax', state.state2.absmax]
    yield ['weight.nested_quant_map', state.state2.code]
    yield ['weight.nested_offset', state.offset!]
  }

  async entries(): Promise<[string, StateEntry][]> {
    const read = this.#read
    const state = this.#state ?? this.#kept
    if (!state) return [['weight', this.codes.stateEntry()]] // an error says why there is none
    const { quantStorage } = this.#options
    const text = new TextEncoder().encode(await state.packedValues())
    const device = read ? toDevice('cpu') : state.absmax.device
    const flat = (part: (codes: Tensor, absmax: Tensor) => Tensor) => {
      const made = this.#state!.withLayout(this.codes.value, 'flat')
      try {
        return part(made.codes, made.state.absmax)
      } finally {
        made.codes.dispose()
        made.state.dispose()
      }
    }
    const stored = (codes: Tensor) =>
      tidy(() => codes.reshape(-1).bitcast('uint8').bitcast(quantStorage).reshape(-1, 1))
    const weight: StateEntry = {
      dtype: quantStorage,
      shape: [packedBytes(this.n, this.k) / DTYPES[quantStorage].bytes, 1],
      key: this.#keys.weight,
      read: () => (read ? tidy(() => stored(read('weight', device))) : flat(stored)),
    }
    const absmax: StateEntry = {
      dtype: state.absmax.dtype,
      shape: [Math.ceil((this.n * this.k) / state.blocksize)],
      key: this.#keys.absmax,
      read: () => (read ? read('weight.absmax', device) : flat((_, statistics) => statistics.share())),
    }
    const table = (tensor: Tensor): StateEntry => ({
      ...entryOf(tensor),
      read: () => onDevice(tensor, device),
    })
    const { code, state2, quantType } = state
    return [
      ['weight', weight],
      ['weight.absmax', absmax],
      ['weight.quant_map', table(code)],
      ...(state2
        ? ([
            ['weight.nested_absmax', table(state2.absmax)],
            ['weight.nested_quant_map', table(state2.code)],
          ] as [string, StateEntry][])
        : []),
      [
        `weight.quant_state.bitsandbytes__${quantType}`,
        {
          dtype: 'uint8',
          shape: [text.length],
          key: this.#keys.values,
          read: () => Tensor.from(text, { device }),
        },
      ],
    ]
  }

  nonfinite(): Promise<number> {
    return this.#finite.count()
  }

  offload(read: (name: string, on?: Device) => Tensor): void {
    const state = this.#state!
    this.#read = read
    // all but the absmax is a table, or small
    this.#kept = new QuantState({
      ...state,
      layout: 'flat',
      absmax: Tensor.empty([0], state.absmax.dtype, state.absmax.device),
      code: state.code.share(),
      offset: state.offset?.share(),
      state2: state.state2 && {
        ...state.state2,
        absmax: state.state2.absmax.share(),
        code: state.state2.code.share(),
      },
    })
    const bytes = (weight: Tensor) => {
      const made = asBytes(weight)
      weight.dispose()
      return made
    }
    this.codes.offload({
      bringIn: () => bytes(read('weight')),
      read: (on) => bytes(read('weight', on)),
    })
    this.#letGo()
  }

  bringIn(): void {
    const kept = this.#kept
    if (!kept || !this.#read || this.#state) return
    this.codes.bringIn()
    this.#state = new QuantState({
      ...kept,
      absmax: this.#read('weight.absmax'),
      code: kept.code.share(),
      offset: kept.offset?.share(),
      state2: kept.state2 && {
        ...kept.state2,
        absmax: kept.state2.absmax.share(),
        code: kept.state2.code.share(),
      },
    })
    this.#arrange()
  }

  release(): void {
    if (!this.#read) return
    this.codes.release()
    this.#letGo()
  }

  #letGo(): void {
    this.#state?.dispose()
    this.#state = undefined
    this.#operand = undefined
  }

  castRefusal(): string {
    return 'whose packed weight has no float dtype to change; dequantize() the model first, or load it with another dtype'
  }

  move(device: Device): void {
    this.#options.device = device
    const old = this.#state
    if (!old || old.absmax.device === device) return
    this.#state = old.to(device)
    this.#operand = undefined
    old.dispose()
    this.#arrange()
  }

  dispose(): void {
    this.codes.dispose()
    this.#letGo()
    this.#kept?.dispose()
    this.#kept = this.#read = undefined
    for (const tensor of this.#parts.values()) tensor.dispose()
    this.#parts.clear()
  }
}
