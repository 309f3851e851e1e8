import { Tensor } from '../tensor.js'
import {
  call,
  checkDTypes,
  checkFloat,
  checkSameDType,
  checkShape,
  fail,
  show,
  withContiguous,
} from './call.js'

/**
 * S sequences packed one after the other, T query tokens in all. Tokens of sequence s are rows queryStarts[s] ..
 * queryStarts[s + 1]; its last one has position lengths[s] - 1. Cached position p lies in block
 * blockTable[s, p / blockLen] at p % blockLen. All int32, all on the device.
 */
export interface RaggedBatch {
  /** [S + 1] */
  queryStarts: Tensor
  /** [S]: cached tokens, those of this call included. */
  lengths: Tensor
  /** [S, maxBlocks] */
  blockTable: Tensor
}

function batchOperands(op: string, batch: RaggedBatch): Tensor[] {
  const { queryStarts, lengths, blockTable } = batch
  for (const [name, t] of Object.entries({ queryStarts, lengths, blockTable }))
    checkDTypes(op, name, t, 'int32')
  const sequences = lengths.shape[0]
  if (
    lengths.ndim !== 1 ||
    queryStarts.size !== sequences! + 1 ||
    blockTable.ndim !== 2 ||
    blockTable.shape[0] !== sequences
  ) {
    fail(
      op,
      `queryStarts ${show(queryStarts.shape)}, lengths ${show(lengths.shape)}, blockTable ${show(blockTable.shape)} do not belong together`,
    )
  }
  return [queryStarts, lengths, blockTable]
}

/** Strides inside a token [H, D] must be contiguous; the step from token to token may be larger. */
function checkTokenRows(op: string, name: string, t: Tensor): void {
  checkFloat(op, name, t)
  if (t.ndim !== 3) fail(op, `${name} is ${show(t.shape)}, it must be [tokens, heads, head_dim]`)
  if (t.size > 0 && (t.strides[2] !== 1 || (t.shape[1] !== 1 && t.strides[1] !== t.shape[2]))) {
    fail(op, `the heads of ${name} are not contiguous`)
  }
}

/** cos and sin float32 [positions, R / 2] from invFreq float32 [R / 2], both times `scale`. */
export function ropeTables(invFreq: Tensor, positions: number, scale = 1): { cos: Tensor; sin: Tensor } {
  checkDTypes('ropeTables', 'invFreq', invFreq, 'float32')
  return withContiguous([invFreq], (frequencies) => {
    const shape = [positions, invFreq.size]
    const cos = Tensor.empty(shape, 'float32', invFreq.device)
    const sin = Tensor.empty(shape, 'float32', invFreq.device)
    call('rope_tables', [cos, sin], [frequencies], [scale])
    return { cos, sin }
  })
}

/** Positions int32 [tokens] of a ragged batch's query tokens. */
export function raggedPositions(batch: RaggedBatch, tokens: number): Tensor {
  const operands = batchOperands('raggedPositions', batch)
  const positions = Tensor.empty([tokens], 'int32', batch.lengths.device)
  call('ragged_positions', [positions], operands)
  return positions
}

/**
 * x [T, H, D] rotated by position (arXiv 2104.09864): the first R elements of each head, R = 2 * cos.shape[1] <= D, in
 * pairs (i, i + R/2), or (2i, 2i + 1) when interleaved. x may have a token stride.
 */
export function rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved = false): Tensor {
  checkTokenRows('rope', 'x', x)
  checkDTypes('rope', 'positions', positions, 'int32')
  checkShape('rope', 'positions', positions, [x.shape[0]!])
  for (const [name, table] of Object.entries({ cos, sin })) checkDTypes('rope', name, table, 'float32')
  if (cos.ndim !== 2) fail('rope', `cos is ${show(cos.shape)}, it must be [positions, rotated elements / 2]`)
  checkShape('rope', 'sin', sin, cos.shape)
  if (cos.shape[1]! * 2 > x.shape[2]!)
    fail('rope', `tables for ${cos.shape[1]! * 2} rotated elements, heads of ${x.shape[2]}`)
  return withContiguous([cos, sin, positions], (c, s, p) => {
    const y = Tensor.empty(x.shape, x.dtype, x.device)
    call('rope', [y], [x, c, s, p], [interleaved ? 1 : 0])
    return y
  })
}

/** Writes k and v [T, KV, D] of the batch's tokens into the caches [blocks, blockLen, KV, D], in place. */
export function pagedWrite(
  keyCache: Tensor,
  valueCache: Tensor,
  k: Tensor,
  v: Tensor,
  batch: RaggedBatch,
): void {
  checkTokenRows('pagedWrite', 'k', k)
  checkTokenRows('pagedWrite', 'v', v)
  checkSameDType('pagedWrite', keyCache, k)
  checkSameDType('pagedWrite', valueCache, v)
  const [blocks, blockLen] = keyCache.shape
  checkShape('pagedWrite', 'keyCache', keyCache, [blocks!, blockLen!, ...k.shape.slice(1)])
  checkShape('pagedWrite', 'valueCache', valueCache, [blocks!, blockLen!, ...v.shape.slice(1)])
  call('paged_write', [keyCache, valueCache], [k, v, ...batchOperands('pagedWrite', batch)])
}

export interface AttentionOptions {
  /** Default 1 / sqrt(D). */
  scale?: number
  causal?: boolean
  /** Keys at least this many positions back are masked; 0: no limit. */
  window?: number
  /** Scores become softcap * tanh(score / softcap); 0: off. */
  softcap?: number
  /**
   * The softmax weights, not their sum, are rounded to q's dtype before they multiply the values. For the CPU: on CUDA
   * tensor cores need that always (16-bit heads of a multiple of 8), and the kernel for other heads never does it.
   */
  roundWeights?: boolean
  /** float32 [H]. */
  alibiSlopes?: Tensor | undefined
  /** float [H]: an extra logit a head that takes probability and gives no value. */
  sinks?: Tensor | undefined
}

/**
 * y [T, H, Dv] = softmax(q k^T scale + masks) v over the cached tokens of each sequence. q [T, H, D]; caches
 * [blocks, blockLen, KV, D or Dv]; H a multiple of KV.
 */
export function pagedAttention(
  q: Tensor,
  keyCache: Tensor,
  valueCache: Tensor,
  batch: RaggedBatch,
  options: AttentionOptions = {},
): Tensor {
  checkTokenRows('pagedAttention', 'q', q)
  checkSameDType('pagedAttention', q, keyCache)
  checkSameDType('pagedAttention', q, valueCache)
  const [tokens, heads, headDim] = q.shape as [number, number, number]
  const [blocks, blockLen, kvHeads, valueDim] = valueCache.shape as [number, number, number, number]
  checkShape('pagedAttention', 'keyCache', keyCache, [blocks, blockLen, kvHeads, headDim])
  if (heads % kvHeads !== 0) fail('pagedAttention', `${heads} query heads do not share ${kvHeads} key heads`)
  const { alibiSlopes, sinks, window = 0 } = options
  if (!Number.isSafeInteger(window) || window < 0)
    fail(
      'pagedAttention',
      `the window is ${String(window)}, it must be a whole number of positions; 0: no limit`,
    )
  for (const [name, t] of Object.entries({ alibiSlopes, sinks })) {
    if (!t) continue
    if (name === 'sinks') checkFloat('pagedAttention', name, t)
    else checkDTypes('pagedAttention', name, t, 'float32')
    checkShape('pagedAttention', name, t, [heads])
  }
  const ofHeads = [...(alibiSlopes ? [alibiSlopes] : []), ...(sinks ? [sinks] : [])]
  return withContiguous(ofHeads, (...given) => {
    const y = Tensor.empty([tokens, heads, valueDim], q.dtype, q.device)
    const slopes = alibiSlopes && given.shift()
    call(
      'paged_attention',
      [y],
      [q, keyCache, valueCache, ...batchOperands('pagedAttention', batch), slopes, given[0]],
      [
        options.scale ?? 1 / Math.sqrt(headDim),
        (options.causal ?? true) ? 1 : 0,
        window,
        options.softcap ?? 0,
        options.roundWeights ? 1 : 0,
      ],
    )
    return y
  })
}
