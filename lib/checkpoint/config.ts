/** config.json and generation_config.json of a checkpoint folder, read field by field with checks. */
import { join } from 'node:path'
import { HalfbyteError } from '../errors.js'
import { DTYPES, type DType } from '../tensor/dtype.js'
import { memberTexts, parseObject, readJsonFile, readTextFile } from './json.js'
import { finishSave } from './replace.js'

type Json = Record<string, unknown>

/** A JSON object whose fields are taken with their types checked; ERR_HALFBYTE_CONFIG names the file and the field. */
export class ConfigReader {
  readonly raw: Readonly<Json>
  readonly file: string
  readonly #aliases: Readonly<Record<string, readonly string[]>>
  /** The file as it was read. */
  readonly text: string | undefined

  constructor(
    raw: Readonly<Json>,
    file: string,
    aliases: Readonly<Record<string, readonly string[]>> = {},
    text?: string,
  ) {
    this.raw = raw
    this.file = file
    this.#aliases = aliases
    this.text = text
  }

  /** The fields as the file has them written, to be written again. */
  texts(): Json {
    return this.text === undefined ? { ...this.raw } : Object.fromEntries(memberTexts(this.text))
  }

  /** A reader of the same object for which fields have further names, as older families call them. */
  alias(aliases: Readonly<Record<string, readonly string[]>>): ConfigReader {
    return new ConfigReader(this.raw, this.file, { ...this.#aliases, ...aliases })
  }

  /** What the file calls a field; where it has it not, the first of its names. */
  #own(name: string): string {
    const names = [...(this.#aliases[name] ?? []), name]
    return names.find((own) => Object.hasOwn(this.raw, own) && this.raw[own] !== null) ?? names[0]!
  }

  fail(what: string): never {
    throw new HalfbyteError('ERR_HALFBYTE_CONFIG', `${this.file}: ${what}`)
  }

  /** The field, or undefined when it is absent or null. */
  get(name: string): unknown {
    const own = this.#own(name)
    return Object.hasOwn(this.raw, own) ? (this.raw[own] ?? undefined) : undefined
  }

  /** A count: a whole number from 1 to `most`. Without an initial value the field must be there. */
  count(name: string, initial?: number, most = Number.MAX_SAFE_INTEGER): number {
    const value = this.get(name) ?? initial
    if (value === undefined) this.fail(`${this.#own(name)} is missing`)
    if (!Number.isSafeInteger(value) || (value as number) < 1) {
      this.fail(`${this.#own(name)} is ${JSON.stringify(value)}, it must be a positive whole number`)
    }
    if ((value as number) > most)
      this.fail(`${this.#own(name)} is ${value as number}, more than ${most} is no model's`)
    return value as number
  }

  /** A number above 0. */
  positive(name: string, initial?: number): number {
    const value = this.number(name, initial)
    if (value <= 0) this.fail(`${this.#own(name)} is ${value}, it must be above 0`)
    return value
  }

  number(name: string, initial?: number): number {
    const value = this.get(name) ?? initial
    if (value === undefined) this.fail(`${this.#own(name)} is missing`)
    if (typeof value !== 'number' || !Number.isFinite(value)) {
      this.fail(`${this.#own(name)} is ${JSON.stringify(value)}, it must be a number`)
    }
    return value
  }

  boolean(name: string, initial: boolean): boolean {
    const value = this.get(name) ?? initial
    if (typeof value !== 'boolean')
      this.fail(`${this.#own(name)} is ${JSON.stringify(value)}, it must be true or false`)
    return value
  }

  string(name: string, initial?: string): string {
    const value = this.get(name) ?? initial
    if (value === undefined) this.fail(`${this.#own(name)} is missing`)
    if (typeof value !== 'string')
      this.fail(`${this.#own(name)} is ${JSON.stringify(value)}, it must be a string`)
    return value
  }

  array(name: string): readonly unknown[] | undefined {
    const value = this.get(name)
    if (value !== undefined && !Array.isArray(value)) {
      this.fail(`${this.#own(name)} is ${JSON.stringify(value)}, it must be an array`)
    }
    return value as readonly unknown[] | undefined
  }

  /** A nested object, as a reader of its own. */
  object(name: string): ConfigReader | undefined {
    const value = this.get(name)
    if (value === undefined) return undefined
    if (typeof value !== 'object' || Array.isArray(value)) {
      this.fail(`${this.#own(name)} is ${JSON.stringify(value)}, it must be an object`)
    }
    return new ConfigReader(value as Json, `${this.file}: ${this.#own(name)}`)
  }

  /** One id or a list of ids; [] when the field is absent. */
  tokenIds(name: string): number[] {
    const value = this.get(name)
    if (value === undefined) return []
    const ids = Array.isArray(value) ? (value as unknown[]) : [value]
    if (!ids.every((id) => Number.isSafeInteger(id) && (id as number) >= 0)) {
      this.fail(`${this.#own(name)} is ${JSON.stringify(value)}, it must be a token id or a list of them`)
    }
    return ids as number[]
  }

  /** The dtype that the weights were saved in, if the config says so: dtype, or torch_dtype in older files. */
  dtype(): DType | undefined {
    const name = this.get('dtype') !== undefined ? 'dtype' : 'torch_dtype'
    const value = this.get(name)
    if (value === undefined || value === 'auto') return undefined
    const short = typeof value === 'string' ? value.replace(/^torch\./, '') : ''
    if (Object.hasOwn(DTYPES, short) && DTYPES[short as DType].isFloat) return short as DType
    return this.fail(
      `${name} is ${JSON.stringify(value)}; halfbyte computes in float32, float16 and bfloat16: pass one of them as dtype`,
    )
  }
}

/** Whether config.json of a folder is what was read: a save replaces it together with the weights. */
export function isCurrent(config: ConfigReader): boolean {
  return readTextFile(config.file) === config.text
}

/** config.json of a folder. */
export function readConfig(folder: string): ConfigReader {
  finishSave(folder)
  const file = join(folder, 'config.json')
  const text = readTextFile(file)
  if (text === undefined) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_CHECKPOINT',
      `${folder}: there is no config.json; give the folder of a model as transformers saves it`,
    )
  }
  return new ConfigReader(parseObject(text, file, 'ERR_HALFBYTE_CONFIG'), file, {}, text)
}

/** What a model wants to be generated with, where a call does not say. */
export interface GenerationDefaults {
  doSample?: boolean
  temperature?: number
  topK?: number
  topP?: number
  minP?: number
  repetitionPenalty?: number
  maxNewTokens?: number
  maxLength?: number
  eosTokenIds: number[]
  padTokenId?: number
  bosTokenId?: number
}

/** generation_config.json, and the fields that older checkpoints have in config.json instead. */
export function readGenerationDefaults(folder: string, config: ConfigReader): GenerationDefaults {
  const file = join(folder, 'generation_config.json')
  const own = new ConfigReader(readJsonFile(file, 'ERR_HALFBYTE_CONFIG') ?? {}, file)
  const from = (name: string) => (own.get(name) !== undefined ? own : config)
  const defaults: GenerationDefaults = { eosTokenIds: from('eos_token_id').tokenIds('eos_token_id') }
  const numbers = [
    ['temperature', 'temperature'],
    ['topK', 'top_k'],
    ['topP', 'top_p'],
    ['minP', 'min_p'],
    ['repetitionPenalty', 'repetition_penalty'],
  ] as const
  for (const [ours, name] of numbers) {
    if (own.get(name) !== undefined) defaults[ours] = own.number(name)
  }
  if (own.get('max_new_tokens') !== undefined) defaults.maxNewTokens = own.count('max_new_tokens')
  if (own.get('max_length') !== undefined) defaults.maxLength = own.count('max_length')
  if (own.get('do_sample') !== undefined) defaults.doSample = own.boolean('do_sample', false)
  const pad = from('pad_token_id').tokenIds('pad_token_id')[0]
  const bos = from('bos_token_id').tokenIds('bos_token_id')[0]
  if (pad !== undefined) defaults.padTokenId = pad
  if (bos !== undefined) defaults.bosTokenId = bos
  return defaults
}
