/** Perplexity over windows of a text. */
import { HalfbyteError } from '../errors.js'
import { abortable } from '../abortable.js'
import { noGrad } from '../tensor/autograd.js'
import type { CausalLM } from './causal_lm.js'

export interface PerplexityOptions {
  /** Tokens that the model sees at once, and predicts the next one after each of. Default 512. */
  window?: number
  signal?: AbortSignal | undefined
  onProgress?: ((done: number, total: number) => void) | undefined
}

export interface Perplexity {
  perplexity: number
  /** Mean of -log p. */
  loss: number
  /** Tokens that were predicted. */
  tokens: number
}

/**
 * exp of the mean of -log p(next token). Windows follow one another; in each of them the model sees nothing before the
 * window, and the token after the last one is predicted too. What is left at the end, less than a window, counts only
 * where there is no whole one.
 */
export async function perplexity(
  model: CausalLM,
  ids: readonly number[],
  options: PerplexityOptions = {},
): Promise<Perplexity> {
  const { window = 512, signal, onProgress } = options
  if (!Number.isInteger(window) || window < 2) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_VALUE',
      `perplexity: window is ${window}, it must be a whole number >= 2`,
    )
  }
  if (ids.length < 2) {
    throw new HalfbyteError('ERR_HALFBYTE_VALUE', `perplexity: ${ids.length} tokens; at least 2 are needed`)
  }
  let sum = 0
  let tokens = 0
  const add = async (losses: Promise<Float32Array>) => {
    for (const loss of await abortable(losses, signal)) sum += loss
  }
  let before: Promise<Float32Array> | undefined
  for (let at = 0; at === 0 || at + window < ids.length; at += window) {
    signal?.throwIfAborted()
    const part = ids.slice(at, at + window + 1)
    const losses = noGrad(() => model.tokenLosses([part]))
    tokens += losses.size
    const values = losses.floats().finally(() => losses.dispose())
    values.catch(() => {})
    // one window computes while the next one is queued
    if (before) await add(before)
    before = values
    onProgress?.(Math.min(at + window, ids.length), ids.length)
  }
  await add(before!)
  return { perplexity: Math.exp(sum / tokens), loss: sum / tokens, tokens }
}

/** Tokens of a text as a language model is evaluated on it: one begin-of-text token in front. */
export function evaluationIds(model: CausalLM, text: string): number[] {
  const { tokenizer } = model
  if (!tokenizer) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_TOKENIZER',
      'perplexity: the model has no tokenizer to read the text with',
    )
  }
  const ids = tokenizer.encode(text)
  const first = model.generationDefaults.bosTokenId ?? tokenizer.bosTokenId
  return first === undefined || ids[0] === first ? ids : [first, ...ids]
}
