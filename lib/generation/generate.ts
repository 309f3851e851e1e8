/** generate() and stream(): prompts in, text out. */
import { HalfbyteError } from '../errors.js'
import { decode } from './decoding.js'
import type { GeneratingModel } from './model.js'
import { readSettings, type GenerateOptions, type Settings } from './options.js'
import { StopStrings, TextStream } from './text.js'
import type { Tokenizer } from './tokenizer.js'

/** A text, which the tokenizer turns into tokens, or tokens. */
export type Prompt = string | readonly number[]

export type FinishReason = 'eos' | 'stop' | 'length'

export interface GenerateResult {
  /** The new text, without stop strings and special tokens; '' where there is no tokenizer. */
  text: string
  /** The new tokens; an end token is the last of them. */
  tokenIds: number[]
  promptIds: number[]
  finishReason: FinishReason
}

export interface StreamPart {
  /** Text that has become certain: may be empty while a character, or what may be a stop string, is incomplete. */
  text: string
  tokenId: number
  /** On the last part. */
  finishReason?: FinishReason
}

/** One sequence on its way from tokens to text. */
class Sequence {
  readonly tokenIds: number[] = []
  readonly promptIds: number[]
  text = ''
  finishReason: FinishReason | undefined
  readonly #settings: Settings
  readonly #limit: number
  readonly #stream: TextStream | undefined
  readonly #stops: StopStrings

  constructor(promptIds: number[], settings: Settings, tokenizer: Tokenizer | undefined, skip: boolean) {
    this.promptIds = promptIds
    this.#settings = settings
    this.#limit = settings.newTokens(promptIds.length)
    this.#stream = tokenizer && new TextStream(tokenizer, promptIds, skip)
    this.#stops = new StopStrings(settings.stops)
  }

  get limit(): number {
    return this.#limit
  }

  push(tokenId: number): StreamPart {
    this.tokenIds.push(tokenId)
    const { text, stop } = this.#stops.push(this.#stream?.push(tokenId) ?? '')
    let out = text
    if (stop !== undefined) this.finishReason = 'stop'
    else if (this.#settings.eos.has(tokenId)) this.finishReason = 'eos'
    else if (this.tokenIds.length === this.#limit) this.finishReason = 'length'
    if (this.finishReason && stop === undefined) {
      const last = this.#stops.push(this.#stream?.flush() ?? '')
      if (last.stop !== undefined) this.finishReason = 'stop'
      out += last.text + (last.stop === undefined ? this.#stops.flush() : '')
    }
    this.text += out
    return { text: out, tokenId, ...(this.finishReason && { finishReason: this.finishReason }) }
  }

  result(): GenerateResult {
    const { text, tokenIds, promptIds, finishReason } = this
    return { text, tokenIds, promptIds, finishReason: finishReason ?? 'length' }
  }
}

function promptIds(prompt: Prompt, model: GeneratingModel, tokenizer: Tokenizer | undefined): number[] {
  let ids: number[]
  if (
    typeof prompt !== 'string' &&
    typeof (prompt as Iterable<number> | undefined)?.[Symbol.iterator] !== 'function'
  ) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_VALUE',
      `generate: the prompt is ${String(prompt)}, it must be a text or token ids`,
    )
  }
  if (typeof prompt === 'string') {
    if (!tokenizer) {
      throw new HalfbyteError(
        'ERR_HALFBYTE_TOKENIZER',
        'generate: a text needs a tokenizer: pass one as options.tokenizer, or give token ids',
      )
    }
    ids = tokenizer.encode(prompt)
    const { bosTokenId } = model.generationDefaults
    if (ids.length === 0 && bosTokenId !== undefined) ids = [bosTokenId]
  } else ids = [...prompt]
  if (ids.length === 0) throw new HalfbyteError('ERR_HALFBYTE_VALUE', 'generate: the prompt has no tokens')
  const { vocabSize } = model.spec
  const bad = ids.find((id) => !Number.isInteger(id) || id < 0 || id >= vocabSize)
  if (bad !== undefined) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_VALUE',
      `generate: token id ${String(bad)} in the prompt; the model has ids 0 to ${vocabSize - 1}`,
    )
  }
  return ids
}

function sequences(model: GeneratingModel, prompts: readonly Prompt[], options: GenerateOptions): Sequence[] {
  const settings = readSettings(options, model.generationDefaults, model.spec.maxPositions)
  options.signal?.throwIfAborted()
  const tokenizer = options.tokenizer ?? model.tokenizer
  if (settings.stops.length > 0 && !tokenizer) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_TOKENIZER',
      'generate: stopStrings need a tokenizer; pass it as options.tokenizer',
    )
  }
  return prompts.map(
    (prompt) =>
      new Sequence(
        promptIds(prompt, model, tokenizer),
        settings,
        tokenizer,
        options.skipSpecialTokens ?? true,
      ),
  )
}

function decodeAll(model: GeneratingModel, all: readonly Sequence[], options: GenerateOptions) {
  const { sampling, eos, minNewTokens } = readSettings(
    options,
    model.generationDefaults,
    model.spec.maxPositions,
  )
  return decode(
    model,
    all.map((sequence) => sequence.promptIds),
    {
      steps: Math.max(...all.map((sequence) => sequence.limit)),
      sampling,
      forbidden: { tokens: [...eos], steps: minNewTokens },
      signal: options.signal,
      onPrefill: options.onPrefill,
    },
  )
}

export async function generate(
  model: GeneratingModel,
  prompts: readonly Prompt[],
  options: GenerateOptions,
): Promise<GenerateResult[]> {
  const all = sequences(model, prompts, options)
  if (all.length === 0) return []
  for await (const tokens of decodeAll(model, all, options)) {
    all.forEach((sequence, s) => {
      if (!sequence.finishReason) sequence.push(tokens[s]!)
    })
    if (all.every((sequence) => sequence.finishReason)) break
  }
  return all.map((sequence) => sequence.result())
}

export async function* stream(
  model: GeneratingModel,
  prompt: Prompt,
  options: GenerateOptions,
): AsyncGenerator<StreamPart, GenerateResult, undefined> {
  const [sequence] = sequences(model, [prompt], options) as [Sequence]
  for await (const tokens of decodeAll(model, [sequence], options)) {
    const part = sequence.push(tokens[0]!)
    yield part
    if (part.finishReason) break
  }
  return sequence.result()
}
