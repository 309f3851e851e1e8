/**
 * The weight of a 4-bit layer: packed codes in a parameter of shape [ceil(n k / 2), 1], the statistics in a QuantState,
 * both in the layout that their device multiplies with.
 * A float weight [n, k] is quantised when it arrives. A weight that is quantised already arrives in parts, which are put
 * together when the last of them is there; see weight4_parts.ts.
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
import { firstValues, type Init } from './init.js'
import { onDevice, type QuantizedWeight } from './packed.js'
import type { Parameter } from './parameter.js'
import { entryOf, type OwnProblems, type StateEntry } from './state_dict.js'
import { packedBytes, Weight4Parts } from './weight4_parts.js'

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

/** Packed codes of whatever storage dtype as uint8 [bytes, 1]. */
function asBytes(weight: Tensor): Tensor {
  return tidy(() => keep(weight.reshape(-1).bitcast('uint8').reshape(-1, 1)))
}

export class Weight4 implements QuantizedWeight {
  readonly n: number
  readonly k: number
  readonly codes: Parameter
  readonly #finite = new FiniteCheck()
  readonly #options: Weight4Options
  #state: QuantState | undefined
  #operand: Packed4 | undefined
  readonly #parts: Weight4Parts
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
    this.#parts = new Weight4Parts(n, k, options)
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

  accepts(name: string): boolean {
    return this.#parts.accepts(name)
  }

  missing(): string[] {
    if (this.#parts.isWaiting) return this.#parts.lacking()
    return this.isLoaded ? [] : ['weight']
  }

  /** Complaints about the part of a state dict that is this weight's. */
  problems(own: ReadonlyMap<string, Tensor>): OwnProblems {
    const there = new Map([...own].filter(([name]) => this.accepts(name)))
    if (there.size === 0) return { missing: ['weight'], unexpected: [], wrong: [] }
    const wrong = [...there].flatMap(([name, tensor]) => {
      const problem = this.#parts.reject(name, tensor)
      return problem ? [{ name, problem }] : []
    })
    return { missing: this.#parts.lacking(there), unexpected: [], wrong }
  }

  /** Takes over one tensor. Float weights are quantised at once; parts wait for the last of them. */
  async load(name: string, tensor: Tensor): Promise<void> {
    this.codes.refuseOffloaded(tensor)
    const problem = this.#parts.reject(name, tensor)
    if (problem) {
      tensor.dispose()
      throw new HalfbyteError('ERR_HALFBYTE_STATE_DICT', `${this.codes.path || name} ${problem}`)
    }
    const target = this.codes.device ?? this.#options.device ?? tensor.device
    const here = keep(tensor.to(target))
    if (here !== tensor) tensor.dispose()
    if (name === 'weight' && this.#parts.isFloatWeight(here)) {
      try {
        this.quantize(here)
      } finally {
        here.dispose()
      }
      return
    }
    const parts = this.#parts.add(name, here)
    if (parts) await this.#assemble(parts)
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
    using values = firstValues(init, this.#parts.floatShape, this.#options.device)
    this.quantize(values)
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
    this.#kept = state.withAbsmax(Tensor.empty([0], state.absmax.dtype, state.absmax.device), 'flat')
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
    this.#state = kept.withAbsmax(this.#read('weight.absmax'), 'flat')
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
    this.#parts.dispose()
  }
}
