/** What attention over the paged cache is measured on: a batch whose sequences all have the same length. */
import { ops, Tensor, type Device, type DType } from 'halfbyte'
import { normalTensor } from './random.js'

export interface AttentionShape {
  dtype: DType
  sequences: number
  /** Query tokens of each sequence, the last of its `context` cached ones. */
  queries: number
  context: number
  heads: number
  kvHeads: number
  headDim: number
}

const LLAMA = { heads: 32, kvHeads: 8, headDim: 128 }

/** The attention of an 8-billion-parameter Llama: a decode step of one sequence and of many, and a whole prompt. */
export const LONG_CONTEXTS: readonly AttentionShape[] = [
  { ...LLAMA, dtype: 'bfloat16', sequences: 1, queries: 1, context: 8192 },
  { ...LLAMA, dtype: 'bfloat16', sequences: 16, queries: 1, context: 8192 },
  { ...LLAMA, dtype: 'bfloat16', sequences: 1, queries: 8192, context: 8192 },
]

export interface AttentionOperands {
  q: Tensor
  keys: Tensor
  values: Tensor
  batch: ops.RaggedBatch
}

/** Every sequence's blocks lie one behind the other. */
export function attentionOperands(s: AttentionShape, device: Device, blockLen = 16): AttentionOperands {
  const columns = Math.ceil(s.context / blockLen)
  const random = (shape: number[], seed: number) => {
    const made = normalTensor(shape, 1, device, seed)
    const converted = made.to(s.dtype)
    if (converted !== made) made.dispose()
    return converted
  }
  const cache = [s.sequences * columns, blockLen, s.kvHeads, s.headDim]
  const integers = (size: number, value: (i: number) => number) =>
    Tensor.from(
      Int32Array.from({ length: size }, (_, i) => value(i)),
      { device },
    )
  return {
    q: random([s.sequences * s.queries, s.heads, s.headDim], 1),
    keys: random(cache, 2),
    values: random(cache, 3),
    batch: {
      queryStarts: integers(s.sequences + 1, (i) => i * s.queries),
      lengths: integers(s.sequences, () => s.context),
      blockTable: integers(s.sequences * columns, (i) => i).reshape(s.sequences, columns),
    },
  }
}

/** Read and written: the keys and values that are cached, the queries and the outputs, each once. */
export function attentionBytes(s: AttentionShape): number {
  const rows = 2 * s.sequences * (s.context * s.kvHeads + s.queries * s.heads)
  return rows * s.headDim * (s.dtype === 'float32' ? 4 : 2)
}
