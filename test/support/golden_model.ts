/** What transformers computed with a small checkpoint, and the comparison with it. */
import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { readConfig } from '../../lib/checkpoint/config'
import { FAMILIES } from '../../lib/models/families'
import { goldenPath } from './golden'
import { readSafetensors } from './safetensors'

export interface GoldenModel {
  folder: string
  /** Sequences of the batch without their padding. */
  sequences: number[][]
  vocabulary: number
  /** Logits of the first sequence alone, [tokens, vocabulary]. */
  logits: Float32Array
  /** Logits of each sequence in the batch. */
  batchLogits: Float32Array[]
  firstLayer: Float32Array
  loss: number
  generated: number[]
}

const summaryFile = goldenPath('models/summary.json')
export const footprints = summaryFile
  ? (JSON.parse(readFileSync(summaryFile, 'utf8')) as { footprint: Record<string, number | string[]> })
      .footprint
  : {}

/** Names of the golden models that are there and whose family the library has. */
export function goldenModels(): string[] {
  const folder = goldenPath('models')!
  return readdirSync(folder, { withFileTypes: true })
    .filter((entry) => entry.isDirectory())
    .map(({ name }) => name)
    .filter((name) => Object.hasOwn(FAMILIES, readConfig(join(folder, name)).string('model_type')))
}

export function readGoldenModel(folder: string): GoldenModel {
  const tensors = readSafetensors(join(folder, 'golden.safetensors'))
  const floats = (name: string) => tensors.get(name)!.data as Float32Array
  const numbers = (name: string) => Array.from(tensors.get(name)!.data as BigInt64Array, Number)
  const [rows, columns] = tensors.get('input_ids')!.shape as [number, number]
  const vocabulary = tensors.get('logits')!.shape[2]!
  const [ids, mask] = [numbers('input_ids'), numbers('attention_mask')]
  const all = floats('logits_padded_batch')
  const sequences: number[][] = []
  const batchLogits: Float32Array[] = []
  for (let row = 0; row < rows; row++) {
    const kept = Array.from({ length: columns }, (_, c) => row * columns + c).filter((i) => mask[i] === 1)
    sequences.push(kept.map((i) => ids[i]!))
    const first = kept[0]!
    // the padding is on one side, so that the rest is one piece
    if (kept.some((i, k) => i !== first + k)) throw new Error('padding in the middle')
    batchLogits.push(all.subarray(first * vocabulary, (first + kept.length) * vocabulary))
  }
  return {
    folder,
    sequences,
    vocabulary,
    logits: floats('logits'),
    batchLogits,
    firstLayer: floats('hidden_first_layer'),
    loss: floats('loss')[0]!,
    generated: numbers('generated'),
  }
}

/** Largest difference and its root mean square, as shares of the range of the expected values. */
export function error(actual: Float32Array, expected: Float32Array): { most: number; mean: number } {
  expect(actual.length).toBe(expected.length)
  let [low, high, most, squares] = [Infinity, -Infinity, 0, 0]
  expected.forEach((value, i) => {
    low = Math.min(low, value)
    high = Math.max(high, value)
    const difference = Math.abs(value - actual[i]!)
    if (!(difference <= most)) most = difference // NaN counts
    squares += difference * difference
  })
  return { most: most / (high - low), mean: Math.sqrt(squares / expected.length) / (high - low) }
}

/** Distance of the two largest values, as a share of the range. */
export function margin(logits: Float32Array): number {
  const sorted = Float32Array.from(logits).sort()
  return (sorted.at(-1)! - sorted.at(-2)!) / (sorted.at(-1)! - sorted[0]!)
}
