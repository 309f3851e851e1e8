/**
 * Decoding on the device: prompts go in by chunks, then every step is one replay of a captured graph that embeds the
 * last tokens, runs the model and chooses the next ones. Tokens, lengths and sampling state live on the device; the host
 * reads tokens behind the device and never has more than two steps queued.
 */
import { abortable } from '../abortable.js'
import { HalfbyteError } from '../errors.js'
import { isSpread } from '../nn/hooks.js'
import { noGrad } from '../tensor/autograd.js'
import type { Graph } from '../tensor/device.js'
import { add, addInto, argmax, sample, type SampleState } from '../tensor/ops.js'
import { Tensor } from '../tensor/tensor.js'
import { keep, tidy } from '../tensor/tidy.js'
import { blocksFor, packBatch, PagedKvCache, type BatchEntry, type PackedBatch } from './cache.js'
import type { GeneratingModel } from './model.js'
import type { Sampling } from './options.js'

/** Prompt tokens that are queued at once. */
const CHUNK = 256
/** Steps that may be queued ahead of the host. */
const AHEAD = 2

export interface DecodingOptions {
  /** Steps in all: tokens to choose for each sequence. */
  steps: number
  sampling: Sampling
  /** Tokens that are not chosen in the first `steps` steps. */
  forbidden: { tokens: readonly number[]; steps: number }
  signal?: AbortSignal | undefined
  onPrefill?: ((done: number, total: number) => void) | undefined
}

/** Nothing of it is kept but the result, neither tensors nor the way back. */
const inference = <T>(fn: () => T): T => noGrad(() => tidy(fn))

/** Chooses tokens for a batch of prompts: one Int32Array a step, an entry for each sequence. */
export async function* decode(
  model: GeneratingModel,
  prompts: readonly (readonly number[])[],
  options: DecodingOptions,
): AsyncGenerator<Int32Array, void, undefined> {
  const { signal, steps } = options
  signal?.throwIfAborted()
  const run = new Decoding(model, prompts, options)
  const pending: Promise<Int32Array>[] = []
  const enqueue = () => {
    const tokens = run.tokens.data() as Promise<Int32Array>
    tokens.catch(() => {}) // whoever stops early does not wait for it
    pending.push(tokens)
  }
  try {
    await run.prefill()
    enqueue()
    for (let queued = 1; pending.length > 0;) {
      while (queued < steps && pending.length < AHEAD) {
        run.step()
        enqueue()
        queued++
      }
      const tokens = await abortable(pending.shift()!, signal)
      if (tokens.some((token) => token < 0 || token >= model.spec.vocabSize)) {
        throw new HalfbyteError(
          'ERR_HALFBYTE_INTERNAL',
          `generate: the device chose the tokens ${tokens.join(', ')}`,
        )
      }
      yield tokens
    }
  } finally {
    run.dispose()
  }
}

class Decoding implements Disposable {
  /** int32 [S]: the tokens chosen last. */
  readonly tokens: Tensor
  readonly #model: GeneratingModel
  readonly #prompts: readonly (readonly number[])[]
  readonly #options: DecodingOptions
  readonly #cache: PagedKvCache
  readonly #blocks: number[][]
  readonly #positions: number
  /** The batch of a step: one token of every sequence. */
  readonly #batch: PackedBatch
  readonly #one: Tensor
  readonly #state: SampleState | undefined
  /** float32 [vocabulary], added to logits: -infinity for tokens that are forbidden as yet. */
  readonly #bias: Tensor | undefined
  #steps = 0
  #graph: Graph | undefined

  constructor(model: GeneratingModel, prompts: readonly (readonly number[])[], options: DecodingOptions) {
    this.#model = model
    this.#prompts = prompts
    this.#options = options
    const device = model.device!
    // the last token that is chosen is never fed back
    const capacity = prompts.map((prompt) => prompt.length + options.steps - 1)
    this.#positions = Math.max(...capacity)
    this.#cache = new PagedKvCache(model.cacheLayers(), {
      blocks: capacity.reduce((sum, tokens) => sum + blocksFor(tokens), 0),
      dtype: model.computeDtype,
      device,
    })
    this.#blocks = capacity.map((tokens) => this.#cache.reserve(tokens))
    this.#batch = packBatch(
      prompts.map((prompt, s) => ({ tokens: [0], cached: prompt.length - 1, blocks: this.#blocks[s]! })),
      device,
    )
    this.tokens = this.#batch.tokens
    this.#one = keep(Tensor.from(Int32Array.of(1), { device }))
    this.#state = sampleState(prompts, options.sampling, model)
    const { tokens: banned, steps } = options.forbidden
    if (steps > 0 && banned.length > 0) {
      const bias = new Float32Array(model.spec.vocabSize)
      for (const token of banned) bias[token] = -Infinity
      this.#bias = keep(Tensor.from(bias, { device }))
    }
    model.model.prepare(this.#positions, device)
  }

  /** Runs the prompts through the model and chooses the first tokens. */
  async prefill(): Promise<void> {
    const { signal, onPrefill } = this.#options
    const total = this.#prompts.reduce((sum, prompt) => sum + prompt.length, 0)
    let last: Tensor | undefined
    let before: Promise<unknown> | undefined
    let done = 0
    try {
      for (const chunk of this.#chunks()) {
        const [hidden, reached] = this.#runChunk(chunk)
        last ??= keep(Tensor.empty([this.#prompts.length, hidden.shape[1]!], hidden.dtype, hidden.device))
        for (const { sequence, row } of chunk.finished) {
          tidy(() => void last!.slice(0, sequence, sequence + 1).copyFrom(hidden.slice(0, row, row + 1)))
        }
        hidden.dispose()
        reached.catch(() => {})
        // one chunk computes, one waits
        if (before) await abortable(before, signal)
        before = reached
        done += chunk.entries.reduce((sum, { tokens }) => sum + tokens.length, 0)
        onPrefill?.(done, total)
      }
      this.#choose(last!)
      await abortable(before!, signal)
    } finally {
      last?.dispose()
    }
  }

  /** Queues one step: the tokens chosen last are cached, and the next ones chosen. */
  step(): void {
    const run = () => {
      const { batch, tokens } = this.#batch
      addInto(batch.lengths, this.#one)
      inference(() => {
        this.#choose(this.#model.model.forward(tokens, batch, this.#cache, this.#positions))
      })
    }
    // a graph is one device's
    const graph = isSpread(this.#model) ? undefined : (this.#graph ??= this.tokens.device.capture(run))
    if (++this.#steps === this.#options.forbidden.steps) {
      this.#bias?.write(new Float32Array(this.#model.spec.vocabSize))
    }
    if (graph) graph.replay()
    else run()
  }

  /** From hidden states [S, hidden]. */
  #choose(hidden: Tensor): void {
    inference(() => {
      let logits = this.#model.head(hidden).to(this.tokens.device)
      if (this.#bias) logits = add(logits.to('float32'), this.#bias)
      this.tokens.copyFrom(this.#state ? sample(logits, this.#state) : argmax(logits))
    })
  }

  /** Parts of the prompts, at most CHUNK tokens together. */
  *#chunks(): Generator<{ entries: BatchEntry[]; finished: { sequence: number; row: number }[] }> {
    let entries: BatchEntry[] = []
    let finished: { sequence: number; row: number }[] = []
    let filled = 0
    for (const [sequence, prompt] of this.#prompts.entries()) {
      for (let at = 0; at < prompt.length;) {
        const take = Math.min(prompt.length - at, CHUNK - filled)
        entries.push({ tokens: prompt.slice(at, at + take), cached: at, blocks: this.#blocks[sequence]! })
        at += take
        filled += take
        if (at === prompt.length) finished.push({ sequence, row: filled - 1 })
        if (filled === CHUNK) {
          yield { entries, finished }
          entries = []
          finished = []
          filled = 0
        }
      }
    }
    if (filled > 0) yield { entries, finished }
  }

  /** Hidden states of a chunk, and a promise of the moment when they are computed. */
  #runChunk(chunk: { entries: BatchEntry[] }): [Tensor, Promise<unknown>] {
    const packed = packBatch(chunk.entries, this.tokens.device)
    try {
      const hidden = inference(() =>
        this.#model.model.forward(packed.tokens, packed.batch, this.#cache, this.#positions),
      )
      const probe = tidy(() => hidden.slice(0, 0, 1).slice(1, 0, 1).clone())
      const reached = probe.data()
      probe.dispose()
      return [keep(hidden), reached]
    } finally {
      packed[Symbol.dispose]()
    }
  }

  dispose(): void {
    this.#graph?.dispose()
    this.#batch[Symbol.dispose]()
    this.#one.dispose()
    this.#bias?.dispose()
    this.#state?.params.dispose()
    this.#state?.rng.dispose()
    this.#state?.seen?.dispose()
    this.#cache.dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }
}

/** Sampling state on the device; undefined where the largest logit wins. */
function sampleState(
  prompts: readonly (readonly number[])[],
  sampling: Sampling,
  model: GeneratingModel,
): SampleState | undefined {
  const device = model.device!
  const penalised = sampling.repetitionPenalty !== 1
  if (sampling.greedy && !penalised) return undefined
  const count = prompts.length
  const row = [
    sampling.greedy ? 0 : sampling.temperature,
    sampling.topK,
    sampling.topP,
    sampling.minP,
    sampling.repetitionPenalty,
  ]
  const params = Float32Array.from({ length: count * row.length }, (_, i) => row[i % row.length]!)
  const rng = BigInt64Array.from({ length: count * 2 }, (_, i) =>
    i % 2 === 0 ? BigInt.asIntN(64, sampling.seed + BigInt(i / 2)) : 0n,
  )
  const state: SampleState = {
    params: keep(Tensor.from(params, { shape: [count, row.length], device })),
    rng: keep(Tensor.from(rng, { shape: [count, 2], device })),
  }
  if (penalised) {
    const vocabulary = model.spec.vocabSize
    const seen = new Uint8Array(count * vocabulary)
    prompts.forEach((prompt, s) => prompt.forEach((id) => (seen[s * vocabulary + id] = 1)))
    state.seen = keep(Tensor.from(seen, { shape: [count, vocabulary], device }))
  }
  return state
}
