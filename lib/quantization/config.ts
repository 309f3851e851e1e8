/**
 * BitsAndBytesConfig: how a model is quantised. Fields, defaults and JSON are those of the Python class, names in
 * camelCase; what Python lets pass silently (no mode, an unknown type, a misspelt field) is an error here.
 */
import { HalfbyteError } from '../errors.js'
import { unknownName } from '../options.js'
import type { DType } from '../tensor/dtype.js'
import type { QuantType } from '../tensor/ops.js'

export type QuantStorage = 'uint8' | 'int8' | 'float16' | 'bfloat16' | 'float32'
export type ComputeDType = 'float32' | 'float16' | 'bfloat16'

export interface BitsAndBytesConfigOptions {
  loadIn8bit?: boolean
  loadIn4bit?: boolean
  /** Activations of at least this magnitude are multiplied in their own precision; 0 turns that off. Default 6. */
  llmInt8Threshold?: number
  /** Modules that stay as they are, in either mode, besides the output head. See replaceWithQuantizedLinear(). */
  llmInt8SkipModules?: readonly string[] | null
  llmInt8EnableFp32CpuOffload?: boolean
  /** The weight stays in 16 bits and is quantised in each forward. */
  llmInt8HasFp16Weight?: boolean
  /** Default 'float32'. */
  bnb4bitComputeDtype?: ComputeDType | null
  /** Default 'fp4'; 'nf4' is the better one for weights that are normally distributed. */
  bnb4bitQuantType?: QuantType
  /** The absmax of the blocks are quantised too. Default false. */
  bnb4bitUseDoubleQuant?: boolean
  /** The dtype that packed weights are stored as in checkpoints. Default 'uint8'. */
  bnb4bitQuantStorage?: QuantStorage | null
  /** Ours: LLM.int8() with bitsandbytes' float16 roundings, and transformers' between its layers. Default false. */
  bnbExact?: boolean
  /** Ours: elements in a 4-bit block. Default 64. */
  blocksize?: number
}

export type Field = keyof BitsAndBytesConfigOptions

/** Our field and the Python one, in the order of the JSON that transformers writes. */
const NAMES: readonly (readonly [Field, string])[] = [
  ['bnb4bitComputeDtype', 'bnb_4bit_compute_dtype'],
  ['bnb4bitQuantStorage', 'bnb_4bit_quant_storage'],
  ['bnb4bitQuantType', 'bnb_4bit_quant_type'],
  ['bnb4bitUseDoubleQuant', 'bnb_4bit_use_double_quant'],
  ['llmInt8EnableFp32CpuOffload', 'llm_int8_enable_fp32_cpu_offload'],
  ['llmInt8HasFp16Weight', 'llm_int8_has_fp16_weight'],
  ['llmInt8SkipModules', 'llm_int8_skip_modules'],
  ['llmInt8Threshold', 'llm_int8_threshold'],
  ['loadIn4bit', 'load_in_4bit'],
  ['loadIn8bit', 'load_in_8bit'],
]
/** Fields that Python does not have; written only when they are not at their default. */
const OURS: readonly (readonly [Field, string])[] = [
  ['bnbExact', 'halfbyte_bnb_exact'],
  ['blocksize', 'halfbyte_blocksize'],
]

const COMPUTE = ['float32', 'float16', 'bfloat16'] as const
export const QUANT_STORAGES = ['uint8', 'int8', 'float16', 'bfloat16', 'float32'] as const
const BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096] as const

function fail(message: string): never {
  throw new HalfbyteError('ERR_HALFBYTE_CONFIG', `BitsAndBytesConfig: ${message}`)
}

function boolean(name: string, value: unknown): boolean {
  if (value === undefined) return false
  return typeof value === 'boolean'
    ? value
    : fail(`${name} is ${JSON.stringify(value)}, it must be true or false`)
}

function oneOf<T extends string | number>(
  name: string,
  value: unknown,
  allowed: readonly T[],
  initial: T,
): T {
  if (value === undefined) return initial
  if (allowed.includes(value as T)) return value as T
  return fail(`${name} is ${JSON.stringify(value)}, it must be one of ${allowed.join(', ')}`)
}

export class BitsAndBytesConfig {
  readonly quantMethod = 'bitsandbytes'
  readonly loadIn8bit: boolean
  readonly loadIn4bit: boolean
  readonly llmInt8Threshold: number
  readonly llmInt8SkipModules: readonly string[] | null
  readonly llmInt8EnableFp32CpuOffload: boolean
  readonly llmInt8HasFp16Weight: boolean
  readonly bnb4bitComputeDtype: ComputeDType & DType
  readonly bnb4bitQuantType: QuantType
  readonly bnb4bitUseDoubleQuant: boolean
  readonly bnb4bitQuantStorage: QuantStorage & DType
  readonly bnbExact: boolean
  readonly blocksize: number
  readonly #given: ReadonlySet<string>

  constructor(options: BitsAndBytesConfigOptions = {}) {
    const given: unknown = options
    if (typeof given !== 'object' || given === null)
      fail(`the fields are ${String(given)}, they must be an object`)
    const known = [...NAMES, ...OURS].map(([field]) => field)
    const unknown = unknownName(options, known, 'field')
    if (unknown !== undefined) fail(unknown)
    this.#given = new Set(Object.keys(options).filter((name) => options[name as Field] !== undefined))
    this.loadIn8bit = boolean('loadIn8bit', options.loadIn8bit)
    this.loadIn4bit = boolean('loadIn4bit', options.loadIn4bit)
    if (this.loadIn8bit && this.loadIn4bit) fail('loadIn4bit and loadIn8bit are both true; choose one')
    if (!this.loadIn8bit && !this.loadIn4bit) fail('neither loadIn4bit nor loadIn8bit is true; choose one')

    const threshold: unknown = options.llmInt8Threshold ?? 6
    if (typeof threshold !== 'number' || !Number.isFinite(threshold) || threshold < 0) {
      fail(`llmInt8Threshold is ${String(threshold)}, it must be a number >= 0`)
    }
    this.llmInt8Threshold = threshold
    const skip: unknown = options.llmInt8SkipModules ?? null
    if (skip !== null && !(Array.isArray(skip) && skip.every((entry) => typeof entry === 'string'))) {
      fail(`llmInt8SkipModules is ${JSON.stringify(skip)}, it must be a list of module names, or null`)
    }
    this.llmInt8SkipModules = skip
    this.llmInt8EnableFp32CpuOffload = boolean(
      'llmInt8EnableFp32CpuOffload',
      options.llmInt8EnableFp32CpuOffload,
    )
    this.llmInt8HasFp16Weight = boolean('llmInt8HasFp16Weight', options.llmInt8HasFp16Weight)
    this.bnb4bitComputeDtype = oneOf(
      'bnb4bitComputeDtype',
      options.bnb4bitComputeDtype ?? undefined,
      COMPUTE,
      'float32',
    )
    this.bnb4bitQuantType = oneOf('bnb4bitQuantType', options.bnb4bitQuantType, ['nf4', 'fp4'], 'fp4')
    this.bnb4bitUseDoubleQuant = boolean('bnb4bitUseDoubleQuant', options.bnb4bitUseDoubleQuant)
    this.bnb4bitQuantStorage = oneOf(
      'bnb4bitQuantStorage',
      options.bnb4bitQuantStorage ?? undefined,
      QUANT_STORAGES,
      'uint8',
    )
    this.bnbExact = boolean('bnbExact', options.bnbExact)
    this.blocksize = oneOf('blocksize', options.blocksize, BLOCKSIZES, 64)
  }

  /** The fields that were given a value, others being at their default. */
  given(): Field[] {
    return [...this.#given] as Field[]
  }

  /** From the quantization_config of a config.json; those of before quant_method was written are accepted. */
  static fromJSON(json: unknown): BitsAndBytesConfig {
    if (typeof json !== 'object' || json === null || Array.isArray(json)) {
      fail(`quantization_config is ${JSON.stringify(json)}, it must be an object`)
    }
    const { quant_method, _load_in_4bit, _load_in_8bit, ...rest } = json as Record<string, unknown>
    if (quant_method !== undefined && quant_method !== 'bitsandbytes') {
      fail(`quant_method is ${JSON.stringify(quant_method)}; only bitsandbytes is known`)
    }
    const fields = new Map([...NAMES, ...OURS].map(([field, name]) => [name, field]))
    // the private pair repeats the public one, and is all that some writers leave
    const options: Record<string, unknown> = {}
    if (_load_in_4bit !== undefined) options['loadIn4bit'] = _load_in_4bit
    if (_load_in_8bit !== undefined) options['loadIn8bit'] = _load_in_8bit
    for (const [name, value] of Object.entries(rest)) {
      const field = fields.get(name)
      if (!field)
        fail(`unknown key ${name} in quantization_config; the keys are ${[...fields.keys()].join(', ')}`)
      options[field] = value
    }
    return new BitsAndBytesConfig(options)
  }

  /** The 13 keys that Python writes, in its order, and ours where they are not at their default. */
  toJSON(): Record<string, unknown> {
    const json: Record<string, unknown> = {
      _load_in_4bit: this.loadIn4bit,
      _load_in_8bit: this.loadIn8bit,
    }
    for (const [field, name] of NAMES) json[name] = this[field]
    json['quant_method'] = this.quantMethod
    if (this.bnbExact) json['halfbyte_bnb_exact'] = true
    if (this.blocksize !== 64) json['halfbyte_blocksize'] = this.blocksize
    return json
  }

  /** toJSON() without what is at its default. */
  toDiff(): Record<string, unknown> {
    const initial = new BitsAndBytesConfig({ loadIn8bit: true }).toJSON()
    for (const name of ['load_in_8bit', '_load_in_8bit']) initial[name] = false
    return Object.fromEntries(
      Object.entries(this.toJSON()).filter(
        ([name, value]) => name === 'quant_method' || value !== initial[name],
      ),
    )
  }

  quantizationMethod(): 'llm_int8' | QuantType {
    return this.loadIn8bit ? 'llm_int8' : this.bnb4bitQuantType
  }
}
