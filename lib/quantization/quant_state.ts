/**
 * What is needed, besides the packed codes, to read a 4-bit tensor; and its form in checkpoints, which is bitsandbytes'
 * own: tensors `absmax`, `quant_map` and, when the absmax is itself quantised, `nested_absmax`, `nested_quant_map`, and one
 * tensor `quant_state.bitsandbytes__nf4` (or fp4) whose bytes are a JSON text with everything that is not a tensor.
 */
import { HalfbyteError } from '../errors.js'
import { native } from '../native.js'
import type { DeviceLike } from '../tensor/device.js'
import { DTYPES, type DType } from '../tensor/dtype.js'
import { checkPacked, tile4, type Layout4, type Packed4, type QuantType } from '../tensor/ops.js'
import { sizeOf, type Shape } from '../tensor/shape.js'
import { Tensor } from '../tensor/tensor.js'
import { jsonFloat } from './json_float.js'
import { Statistics, type NestedState } from './statistics.js'

export interface QuantStateParts {
  /** float32 [blocks], or uint8 [blocks] with state2 and offset. */
  absmax: Tensor
  shape: Shape
  /** float32 [16]; without it the quantType's own. */
  code?: Tensor | undefined
  blocksize: number
  quantType: QuantType
  /** The dtype that was quantised, and that dequantising gives. */
  dtype: DType
  /** float32 [1], the mean that was taken off the absmax. */
  offset?: Tensor | undefined
  state2?: NestedState | undefined
  /** The order of the codes and of absmax; default 'flat'. */
  layout?: Layout4 | undefined
}

/** A value of a state's dictionary. */
export type StateValue = Tensor | Uint8Array | string | number | readonly number[] | null | undefined
type StateDictionary = ReadonlyMap<string, StateValue> | Readonly<Record<string, StateValue>>

const PREFIX = 'bitsandbytes__'
const TENSORS = ['absmax', 'quant_map', 'nested_absmax', 'nested_quant_map']
const VALUES = [
  'quant_type',
  'blocksize',
  'dtype',
  'shape',
  'nested_blocksize',
  'nested_dtype',
  'nested_offset',
]

function broken(what: string): never {
  throw new HalfbyteError('ERR_HALFBYTE_STATE_DICT', `QuantState: ${what}`)
}

/** A codebook of the library as a tensor of its own: nf4, fp4 (16 entries), dynamic, dynamic_unsigned (256). */
export function codebook(name: 'nf4' | 'fp4' | 'dynamic' | 'dynamic_unsigned', device: DeviceLike): Tensor {
  return Tensor.from(native.codebook(name), { device })
}

/** Owns its tensors: no tidy() frees them, dispose() does. */
export class QuantState extends Statistics {
  readonly shape: Shape
  readonly blocksize: number
  readonly quantType: QuantType
  readonly dtype: DType
  /** 'flat', as in checkpoints, or the order that the device multiplies with; see withLayout(). */
  readonly layout: Layout4

  constructor(parts: QuantStateParts) {
    super({ ...parts, code: parts.code ?? codebook(parts.quantType, parts.absmax.device) })
    this.shape = [...parts.shape]
    this.blocksize = parts.blocksize
    this.quantType = parts.quantType
    this.dtype = parts.dtype
    this.layout = parts.layout ?? 'flat'
  }

  /** Bytes of all tensors of the state. */
  get nbytes(): number {
    return this.tensors.reduce((sum, tensor) => sum + tensor.nbytes, 0)
  }

  /** With its codes, as the ops take it. Checks that the parts belong together. */
  packed(codes: Tensor): Packed4 {
    const k = this.shape.at(-1) ?? 1
    const weight: Packed4 = {
      codes,
      absmax: this.absmax,
      nestedAbsmax: this.state2?.absmax,
      nestedCode: this.state2?.code,
      offset: this.offset,
      quantType: this.quantType,
      blocksize: this.blocksize,
      n: sizeOf(this.shape.slice(0, -1)),
      k,
      layout: this.layout,
    }
    checkPacked('QuantState', weight)
    return weight
  }

  /**
   * Codes in another layout and a state of their own for them: a permutation, undone by asking for the first. Views
   * where nothing changes.
   */
  withLayout(codes: Tensor, layout: Layout4): { codes: Tensor; state: QuantState } {
    const made = tile4(this.packed(codes), layout)
    return { codes: made.codes, state: this.withAbsmax(made.absmax, layout) }
  }

  /** @internal A state with another absmax, in a layout, and tables of its own: what `table` makes of each. */
  withAbsmax(absmax: Tensor, layout: Layout4, table = (tensor: Tensor) => tensor.share()): QuantState {
    const { code, offset, state2 } = this
    return new QuantState({
      ...this,
      layout,
      absmax,
      code: table(code),
      offset: offset && table(offset),
      state2: state2 && { ...state2, absmax: table(state2.absmax), code: table(state2.code) },
    })
  }

  /**
   * As bitsandbytes writes it. Packed: only tensors, as in checkpoints. Otherwise the names and values of its attributes.
   * The tensors are views, to be disposed by the caller. A promise, because the offset has to be read.
   */
  asDict(packed: true): Promise<Map<string, Tensor>>
  asDict(packed?: boolean): Promise<Map<string, StateValue>>
  async asDict(packed = false): Promise<Map<string, StateValue>> {
    if (this.layout !== 'flat')
      broken("asDict: checkpoints hold the flat layout; call withLayout(codes, 'flat')")
    const all = await this.#values()
    const tensors = [...all].filter(([name]) => TENSORS.includes(name)) as [string, Tensor][]
    const shared = tensors.map(([name, tensor]) => [name, tensor.share()] as const)
    if (!packed) return new Map([...all, ...shared])
    const bytes = Tensor.from(new TextEncoder().encode(packedText(all)), { device: this.absmax.device })
    return new Map([...shared, [`quant_state.${PREFIX}${this.quantType}`, bytes]])
  }

  /** The JSON text that the packed form has besides its tensors. */
  async packedValues(): Promise<string> {
    return packedText(await this.#values())
  }

  async #values(): Promise<Map<string, StateValue>> {
    const offset = this.offset && (await this.offset.item())
    const { state2 } = this
    const all = new Map<string, StateValue>([
      ['quant_type', this.quantType],
      ['absmax', this.absmax],
      ['blocksize', this.blocksize],
      ['quant_map', this.code],
      ['dtype', this.dtype],
      ['shape', this.shape],
    ])
    if (state2) {
      all.set('nested_absmax', state2.absmax)
      all.set('nested_blocksize', state2.blocksize)
      all.set('nested_quant_map', state2.code)
      all.set('nested_dtype', state2.dtype)
      all.set('nested_offset', offset)
    }
    return all
  }

  /**
   * From either form of asDict(); names may carry a prefix (`model.layers.0.mlp.up_proj.weight.absmax`). The tensors stay
   * the caller's: the state holds views of its own, on `device` when one is given.
   */
  static async fromDict(dictionary: StateDictionary, device?: DeviceLike): Promise<QuantState> {
    const entries = new Map<string, StateValue>(
      dictionary instanceof Map ? dictionary : Object.entries(dictionary),
    )
    const packed = [...entries.keys()].filter((name) => name.includes(`quant_state.${PREFIX}`))
    if (packed.length > 1) broken(`${packed.length} packed states (${packed.join(', ')}), one is needed`)
    let values: Record<string, StateValue> = {}
    for (const name of packed) {
      values = parseState(await bytesOf(name, entries.get(name)))
      entries.delete(name)
      const stated = name.split(PREFIX).at(-1)
      if (values['quant_type'] !== stated) {
        broken(`${name} says quant_type ${JSON.stringify(values['quant_type'])}`)
      }
    }
    for (const [name, value] of entries) {
      const short = name.split('.').at(-1)!
      if (!TENSORS.includes(short) && !VALUES.includes(short)) broken(`unknown component ${name}`)
      values[short] = value
    }
    const state = build(values, device)
    try {
      await checkCode(state)
      return state
    } catch (error) {
      state.dispose()
      throw error
    }
  }

  /** The same state on another device; itself when it is there already. */
  to(device: DeviceLike): QuantState {
    const move = (tensor: Tensor) => {
      const moved = tensor.to(device)
      return moved === tensor ? tensor.share() : moved
    }
    return this.withAbsmax(move(this.absmax), this.layout, move)
  }
}

/** What is no tensor, as JSON. */
function packedText(all: ReadonlyMap<string, StateValue>): string {
  const members = VALUES.filter((name) => all.has(name)).map(
    (name) => `"${name}": ${pythonJson(name, all.get(name))}`,
  )
  return `{${members.join(', ')}}`
}

/** A value as Python's json.dumps writes it. */
function pythonJson(name: string, value: StateValue): string {
  if (name === 'nested_offset') return jsonFloat(value as number)
  if (Array.isArray(value)) return `[${value.join(', ')}]`
  return JSON.stringify(value)
}

async function bytesOf(name: string, value: StateValue): Promise<Uint8Array> {
  if (value instanceof Uint8Array) return value
  if (value instanceof Tensor && value.dtype === 'uint8') return (await value.data()) as Uint8Array
  return broken(`${name} must be a uint8 tensor`)
}

function parseState(bytes: Uint8Array): Record<string, StateValue> {
  let parsed: unknown
  try {
    parsed = JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(bytes))
  } catch (cause) {
    broken(`its JSON cannot be read: ${(cause as Error).message}`)
  }
  if (typeof parsed !== 'object' || parsed === null || Array.isArray(parsed))
    broken('its JSON is not an object')
  for (const name of Object.keys(parsed)) {
    if (!VALUES.includes(name)) broken(`unknown component ${name} in its JSON`)
  }
  return parsed as Record<string, StateValue>
}

function build(values: Record<string, StateValue>, device: DeviceLike | undefined): QuantState {
  const tensor = (name: string, ...dtypes: DType[]): Tensor => {
    const value = values[name]
    if (!(value instanceof Tensor)) broken(`${name} is missing`)
    if (!dtypes.includes(value.dtype)) broken(`${name} is ${value.dtype}, it must be ${dtypes.join(' or ')}`)
    return value
  }
  const wholes = (name: string): number[] => {
    const value = values[name]
    if (!Array.isArray(value) || !value.every((n) => Number.isSafeInteger(n) && n >= 0)) {
      broken(`${name} ${JSON.stringify(value)} is not a list of whole numbers`)
    }
    return value as number[]
  }
  const quantType = values['quant_type']
  if (quantType !== 'nf4' && quantType !== 'fp4') {
    broken(`quant_type ${JSON.stringify(quantType)} is neither nf4 nor fp4`)
  }
  const dtype = values['dtype'] as DType
  if (typeof dtype !== 'string' || !Object.hasOwn(DTYPES, dtype) || !DTYPES[dtype].isFloat) {
    broken(`dtype ${JSON.stringify(dtype)} is not a float dtype`)
  }
  const blocksize = wholesOne(values['blocksize'], 'blocksize')
  const shape = wholes('shape')
  const blocks = Math.ceil(sizeOf(shape) / blocksize)
  const isNested = values['nested_absmax'] !== undefined || values['nested_offset'] !== undefined
  const absmax = tensor('absmax', isNested ? 'uint8' : 'float32')
  if (absmax.size !== blocks) {
    broken(`absmax has ${absmax.size} entries, ${blocks} blocks of ${blocksize} make [${shape.join(', ')}]`)
  }
  const code = tensor('quant_map', 'float32')
  if (code.size !== 16) broken(`quant_map has ${code.size} entries, it must have 16`)
  const place = (value: Tensor): Tensor => {
    const moved = device === undefined ? value : value.to(device)
    return moved === value ? value.share() : moved
  }
  const common = { shape, blocksize, quantType, dtype } as const
  if (!isNested) return new QuantState({ ...common, absmax: place(absmax), code: place(code) })

  if (wholesOne(values['nested_blocksize'], 'nested_blocksize') !== 256) {
    broken(`nested_blocksize is ${String(values['nested_blocksize'])}, it must be 256`)
  }
  if (values['nested_dtype'] !== 'float32') broken('nested_dtype must be float32')
  const offset = values['nested_offset']
  if (typeof offset !== 'number' || !Number.isFinite(Math.fround(offset)))
    broken(
      `nested_offset ${typeof offset === 'number' ? offset : JSON.stringify(offset)} is not a float32 number`,
    )
  const nestedAbsmax = tensor('nested_absmax', 'float32')
  if (nestedAbsmax.size !== Math.ceil(blocks / 256)) {
    broken(`nested_absmax has ${nestedAbsmax.size} entries, ${blocks} blocks need ${Math.ceil(blocks / 256)}`)
  }
  const nestedCode = tensor('nested_quant_map', 'float32')
  if (nestedCode.size !== 256) broken(`nested_quant_map has ${nestedCode.size} entries, it must have 256`)
  return new QuantState({
    ...common,
    absmax: place(absmax),
    code: place(code),
    offset: Tensor.from(Float32Array.of(offset), { device: device ?? absmax.device }),
    state2: { absmax: place(nestedAbsmax), code: place(nestedCode), blocksize: 256, dtype: 'float32' },
  })
}

function wholesOne(value: StateValue, name: string): number {
  if (typeof value === 'number' && Number.isSafeInteger(value) && value > 0) return value
  return broken(`${name} ${JSON.stringify(value)} is not a positive whole number`)
}

/** The kernels know the two codebooks; a file with another one would be read wrongly. */
async function checkCode(state: QuantState): Promise<void> {
  const found = (await state.code.data()) as Float32Array
  const own = native.codebook(state.quantType)
  const at = found.findIndex((value, i) => value !== own[i])
  if (at >= 0) broken(`quant_map[${at}] is ${found[at]}, that of ${state.quantType} is ${own[at]}`)
}
