/** Sampling in plain JavaScript, by transformers' rules and the definitions of kernels/backend.h. */

const { exp, fround, max, min } = Math // looking up globals is slow inside jest

export interface SamplingParams {
  temperature?: number
  topK?: number
  topP?: number
  minP?: number
  penalty?: number
}

export const row = (p: SamplingParams): number[] => [
  p.temperature ?? 1,
  p.topK ?? 0,
  p.topP ?? 1,
  p.minP ?? 0,
  p.penalty ?? 1,
]

/**
 * Probabilities after every filter; 0 for what is not kept. Follows the processors one after the other; tokens with equal
 * logits stay together.
 */
export function probabilities(
  logits: ArrayLike<number>,
  p: SamplingParams,
  seen?: ArrayLike<number>,
): Float64Array {
  const { temperature = 1, topK = 0, topP = 1, minP = 0, penalty = 1 } = p
  let scores = Array.from(logits, (x, i) => {
    if (!seen?.[i]) return x
    return fround(x < 0 ? x * fround(penalty) : x / fround(penalty))
  })
  scores = scores.map((x) => fround(x / fround(temperature)))
  if (topK > 0) {
    const kth = Float32Array.from(scores).sort().at(-min(topK, scores.length))!
    scores = scores.map((x) => (x < kth ? -Infinity : x))
  }
  if (topP < 1) {
    const chances = softmax(scores)
    const descending = scores.map((_, i) => i).sort((a, b) => scores[b]! - scores[a]!)
    let [above, sum, value] = [0, 0, Infinity] // of strictly larger scores, and with those that are equal
    for (const i of descending) {
      if (scores[i]! < value) [above, value] = [sum, scores[i]!]
      sum += chances[i]!
      if (!(above < fround(topP))) scores[i] = -Infinity
    }
  }
  if (minP > 0) {
    const chances = softmax(scores)
    let best = 0
    for (const chance of chances) best = max(best, chance)
    scores = scores.map((x, i) => (chances[i]! < fround(minP) * best ? -Infinity : x))
  }
  return softmax(scores)
}

function softmax(scores: readonly number[]): Float64Array {
  let top = -Infinity
  for (const x of scores) top = max(top, x)
  const chances = new Float64Array(scores.length)
  let sum = 0
  for (let i = 0; i < chances.length; i++) sum += chances[i] = exp(scores[i]! - top)
  for (let i = 0; i < chances.length; i++) chances[i]! /= sum
  return chances
}

/** Philox 4x32-10 (SC 2011) with key `seed`, counter (counter, 0): uniform in [0, 1). */
export function uniform(seed: bigint, counter: bigint): number {
  const word = (1n << 32n) - 1n
  let [a, b, c, d] = [counter & word, (counter >> 32n) & word, 0n, 0n]
  let [k, l] = [seed & word, (seed >> 32n) & word]
  for (let round = 0; round < 10; round++) {
    const [x, y] = [0xd2511f53n * a, 0xcd9e8d57n * c]
    ;[a, b, c, d] = [(y >> 32n) ^ b ^ k, y & word, (x >> 32n) ^ d ^ l, x & word]
    k = (k + 0x9e3779b9n) & word
    l = (l + 0xbb67ae85n) & word
  }
  return Number((a << 21n) | (b >> 11n)) / 2 ** 53
}
