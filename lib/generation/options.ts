/** The options of generate() and stream(), checked and completed with what the model says about itself. */
import type { GenerationDefaults } from '../checkpoint/config.js'
import { HalfbyteError } from '../errors.js'
import { unknownName, wrongHandler } from '../options.js'
import type { Tokenizer } from './tokenizer.js'

export interface GenerateOptions {
  /** Most tokens to generate. Default: generation_config.json, else 256; never beyond the model's positions. */
  maxNewTokens?: number
  /** Most tokens in all, the prompt's included. */
  maxLength?: number
  /** No end token is chosen before that many tokens. Default 0. */
  minNewTokens?: number
  /** Draw tokens at random. Default: when a sampling option is given, else what generation_config.json says. */
  doSample?: boolean
  /** 0 is greedy. Default 1. */
  temperature?: number
  /** Only the k most likely tokens; 0: all. */
  topK?: number
  /** Only the most likely tokens that have this probability together; 1: all. */
  topP?: number
  /** Only tokens at least this many times as likely as the most likely one; 0: all. */
  minP?: number
  /** Above 1: tokens of the prompt and of the text so far become less likely. */
  repetitionPenalty?: number
  /** The same seed draws the same tokens. Default: another one each time. */
  seed?: number
  /** Tokens that end the text. Default: the model's. */
  eosTokenId?: number | readonly number[] | null
  /** Texts that end the text, and are not part of it. Needs a tokenizer. */
  stopStrings?: string | readonly string[]
  /** Default: the tokenizer beside the model's weights. */
  tokenizer?: Tokenizer | undefined
  /** Default true: special tokens do not appear in the text. */
  skipSpecialTokens?: boolean
  /** Aborting rejects with its reason. */
  signal?: AbortSignal | undefined
  /** Told how much of the prompt has been read. */
  onPrefill?: ((done: number, total: number) => void) | undefined
}

export interface Sampling {
  greedy: boolean
  temperature: number
  topK: number
  topP: number
  minP: number
  repetitionPenalty: number
  seed: bigint
}

export interface Settings {
  sampling: Sampling
  eos: ReadonlySet<number>
  stops: readonly string[]
  minNewTokens: number
  /** Tokens to generate after a prompt of that many tokens. */
  newTokens(promptLength: number): number
}

function fail(message: string): never {
  throw new HalfbyteError('ERR_HALFBYTE_VALUE', `generate: ${message}`)
}

const shown = (value: unknown) => (typeof value === 'string' ? JSON.stringify(value) : String(value))

function inRange(name: string, value: number, low: number, high: number, whole = false): number {
  const fits =
    typeof value === 'number' && value >= low && value <= high && (!whole || Number.isInteger(value))
  if (!fits) {
    const kind = whole ? 'a whole number' : 'a number'
    fail(
      `${name} is ${shown(value)}, it must be ${kind} ${high === Infinity ? `>= ${low}` : `from ${low} to ${high}`}`,
    )
  }
  return value
}

/** true, false, or not given. */
function flag(name: string, value: boolean | null | undefined): boolean | undefined {
  if (value !== undefined && value !== null && typeof value !== 'boolean')
    fail(`${name} is ${shown(value)}, it must be true or false`)
  return value ?? undefined
}

const KNOWN: readonly (keyof GenerateOptions)[] = [
  'maxNewTokens',
  'maxLength',
  'minNewTokens',
  'doSample',
  'temperature',
  'topK',
  'topP',
  'minP',
  'repetitionPenalty',
  'seed',
  'eosTokenId',
  'stopStrings',
  'tokenizer',
  'skipSpecialTokens',
  'signal',
  'onPrefill',
]

export function readSettings(
  options: GenerateOptions,
  defaults: GenerationDefaults,
  maxPositions: number,
): Settings {
  if (typeof options !== 'object' || options === null)
    fail(`the options are ${shown(options)}, they must be an object`)
  const problem = unknownName(options, KNOWN, 'option') ?? wrongHandler(options)
  if (problem !== undefined) fail(problem)
  const eos = options.eosTokenId === undefined ? defaults.eosTokenIds : (options.eosTokenId ?? [])
  if (typeof eos !== 'number' && typeof (eos as Iterable<number>)[Symbol.iterator] !== 'function')
    fail(`eosTokenId is ${shown(eos)}, it must be a token id or a list of them`)
  const ids = typeof eos === 'number' ? [eos] : eos
  for (const id of ids) inRange('eosTokenId', id, 0, Infinity, true)
  flag('skipSpecialTokens', options.skipSpecialTokens)
  const tokenizer: unknown = options.tokenizer ?? undefined
  if (tokenizer !== undefined && typeof (tokenizer as Partial<Tokenizer>).encode !== 'function')
    fail(
      `tokenizer is ${shown(tokenizer)}, it must be a Tokenizer, as AutoTokenizer.fromPretrained() gives it`,
    )
  const stops = options.stopStrings ?? []
  return {
    sampling: readSampling(options, defaults),
    eos: new Set(ids),
    minNewTokens: inRange('minNewTokens', options.minNewTokens ?? 0, 0, Infinity, true),
    stops: typeof stops === 'string' ? [stops] : stops,
    newTokens: (promptLength) => newTokens(promptLength, options, defaults, maxPositions),
  }
}

/** Below this temperature logits leave float32 when they are divided by it, and would all be equal. */
const COLD = 1e-30

function readSampling(options: GenerateOptions, defaults: GenerationDefaults): Sampling {
  const given = [options.temperature, options.topK, options.topP, options.minP].some(
    (value) => (value ?? undefined) !== undefined,
  )
  const temperature = inRange('temperature', options.temperature ?? defaults.temperature ?? 1, 0, Infinity)
  const doSample = flag('doSample', options.doSample) ?? (given || (defaults.doSample ?? false))
  const seed = options.seed ?? Math.floor(Math.random() * 2 ** 48)
  if (!Number.isSafeInteger(seed)) fail(`seed is ${shown(seed)}, it must be a whole number`)
  const repetitionPenalty = options.repetitionPenalty ?? defaults.repetitionPenalty ?? 1
  if (typeof repetitionPenalty !== 'number' || !(repetitionPenalty > 0) || repetitionPenalty === Infinity) {
    fail(`repetitionPenalty is ${shown(repetitionPenalty)}, it must be a number above 0`)
  }
  return {
    greedy: !doSample || temperature < COLD,
    temperature,
    topK: inRange('topK', options.topK ?? defaults.topK ?? 0, 0, Infinity, true),
    topP: inRange('topP', options.topP ?? defaults.topP ?? 1, 0, 1),
    minP: inRange('minP', options.minP ?? defaults.minP ?? 0, 0, 1),
    repetitionPenalty,
    seed: BigInt(seed),
  }
}

function newTokens(
  promptLength: number,
  options: GenerateOptions,
  defaults: GenerationDefaults,
  maxPositions: number,
): number {
  if (promptLength > maxPositions) {
    fail(
      `the prompt has ${promptLength} tokens, the model has positions for ${maxPositions} (max_position_embeddings); shorten the prompt`,
    )
  }
  const room = maxPositions - promptLength
  if (room === 0)
    fail(
      `the prompt fills all ${maxPositions} positions of the model; shorten it to leave room for new tokens`,
    )
  if (options.maxNewTokens !== undefined) {
    return Math.min(inRange('maxNewTokens', options.maxNewTokens, 1, Infinity, true), room)
  }
  if (options.maxLength !== undefined) {
    const left = inRange('maxLength', options.maxLength, 1, Infinity, true) - promptLength
    if (left < 1)
      fail(`maxLength ${options.maxLength} leaves no room after a prompt of ${promptLength} tokens`)
    return Math.min(left, room)
  }
  const fromFile = defaults.maxNewTokens ?? (defaults.maxLength ?? 0) - promptLength
  return Math.min(fromFile > 0 ? fromFile : 256, room)
}
