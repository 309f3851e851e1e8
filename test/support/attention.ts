/** Ragged batches over a scattered paged cache, and attention in double precision over plain arrays. */
import { Tensor, ops, type DeviceLike, type DType } from '../../lib/index'
import { noise, rounded as roundedTo } from './reference'

export interface Case {
  /** Query tokens of each sequence, and its cached tokens with these. */
  queries: number[]
  lengths: number[]
  heads: number
  kvHeads: number
  headDim: number
  valueDim?: number
  blockLen?: number
  dtype?: DType
  causal?: boolean
  window?: number
  softcap?: number
  alibi?: boolean
  sinks?: boolean
  scale?: number
  /** Softmax weights are rounded to the dtype before they multiply values. */
  roundWeights?: boolean
}

export interface Problem {
  q: Float32Array
  /** [sequence][position * kvHeads * dim + ...] */
  keys: Float32Array[]
  values: Float32Array[]
  slopes: Float32Array
  sinks: Float32Array
}

const rounded = async (x: Float32Array, dtype: DType, device: DeviceLike): Promise<Float32Array> =>
  x.length === 0 ? x : Tensor.from(x, { device }).to(dtype).floats()

export async function makeProblem(c: Case, device: DeviceLike): Promise<Problem> {
  const dtype = c.dtype ?? 'float32'
  const valueDim = c.valueDim ?? c.headDim
  const tokens = c.queries.reduce((a, b) => a + b, 0)
  const many = (n: number, dim: number, seed: number) =>
    rounded(noise(n * c.kvHeads * dim, seed), dtype, device)
  return {
    q: await rounded(
      noise(tokens * c.heads * c.headDim, 1).map((x) => 2 * x),
      dtype,
      device,
    ),
    keys: await Promise.all(c.lengths.map((n, s) => many(n, c.headDim, 10 + s))),
    values: await Promise.all(c.lengths.map((n, s) => many(n, valueDim, 50 + s))),
    slopes: Float32Array.from({ length: c.heads }, (_, h) => 2 ** (-(h + 1) / 2)),
    sinks: noise(c.heads, 7),
  }
}

/** [T, H, Dv] in double precision. */
export function referenceAttention(c: Case, p: Problem): Float64Array {
  const { heads, kvHeads, headDim } = c
  const valueDim = c.valueDim ?? headDim
  const scale = c.scale ?? 1 / Math.sqrt(headDim)
  const tokens = c.queries.reduce((a, b) => a + b, 0)
  const y = new Float64Array(tokens * heads * valueDim)
  let token = 0
  c.queries.forEach((count, s) => {
    for (let i = 0; i < count; i++, token++) {
      const position = c.lengths[s]! - count + i
      for (let h = 0; h < heads; h++) {
        const kv = Math.floor(h / (heads / kvHeads))
        const scores: number[] = []
        const seen: number[] = []
        for (let j = 0; j < c.lengths[s]!; j++) {
          if ((c.causal ?? true) && j > position) continue
          if (c.window && position - j >= c.window) continue
          let dot = 0
          for (let d = 0; d < headDim; d++)
            dot += p.q[(token * heads + h) * headDim + d]! * p.keys[s]![(j * kvHeads + kv) * headDim + d]!
          dot *= scale
          if (c.softcap) dot = c.softcap * Math.tanh(dot / c.softcap)
          if (c.alibi) dot += p.slopes[h]! * (j - position)
          scores.push(dot)
          seen.push(j)
        }
        const top = Math.max(...scores, c.sinks ? p.sinks[h]! : -Infinity)
        const weights = scores.map((x) => Math.exp(x - top))
        const sum = weights.reduce((a, b) => a + b, c.sinks ? Math.exp(p.sinks[h]! - top) : 0)
        const factors = c.roundWeights ? weights.map((w) => roundedTo(w, c.dtype ?? 'float32')) : weights
        seen.forEach((j, at) => {
          for (let d = 0; d < valueDim; d++)
            y[(token * heads + h) * valueDim + d]! +=
              (factors[at]! / sum) * p.values[s]![(j * kvHeads + kv) * valueDim + d]!
        })
      }
    }
  })
  return y
}

export interface Cache {
  keys: Tensor
  values: Tensor
  table: number[][]
}

/** Empty (NaN) caches, with blocks handed out to the sequences in a scattered order. */
export function makeCache(c: Case, device: DeviceLike, lengths = c.lengths): Cache {
  const blockLen = c.blockLen ?? 16
  const need = lengths.map((n) => Math.ceil(n / blockLen))
  const width = Math.max(1, ...need) + 1
  const blocks = need.reduce((a, b) => a + b, 0) + 2
  let next = 0
  const step = [7, 5, 3, 11, 13].find((n) => blocks % n !== 0)!
  const table = need.map((n) =>
    Array.from({ length: width }, (_, i) => (i < n ? (step * ++next) % blocks : -1)),
  )
  const dtype = c.dtype ?? 'float32'
  const shape = [blocks, blockLen, c.kvHeads]
  return {
    keys: Tensor.full([...shape, c.headDim], NaN, dtype, device),
    values: Tensor.full([...shape, c.valueDim ?? c.headDim], NaN, dtype, device),
    table,
  }
}

export function makeBatch(
  queries: number[],
  lengths: number[],
  table: number[][],
  device: DeviceLike,
): ops.RaggedBatch {
  const starts = [0]
  for (const n of queries) starts.push(starts.at(-1)! + n)
  const width = table[0]?.length ?? 1
  return {
    queryStarts: Tensor.from(Int32Array.from(starts), { device }),
    lengths: Tensor.from(Int32Array.from(lengths), { device }),
    blockTable: Tensor.from(Int32Array.from(table.flat()), { shape: [table.length, width], device }),
  }
}

/** Writes positions from[s] .. to[s] of every sequence. */
export function fillCache(
  c: Case,
  p: Problem,
  cache: Cache,
  from: number[],
  to: number[],
  device: DeviceLike,
): void {
  const slice = (all: Float32Array[], dim: number) => {
    const row = c.kvHeads * dim
    const parts = all.map((x, s) => [...x.subarray(from[s]! * row, to[s]! * row)]).flat()
    const shape = [parts.length / row, c.kvHeads, dim]
    return Tensor.from(Float32Array.from(parts), { shape, device }).to(c.dtype ?? 'float32')
  }
  const counts = to.map((n, s) => n - from[s]!)
  ops.pagedWrite(
    cache.keys,
    cache.values,
    slice(p.keys, c.headDim),
    slice(p.values, c.valueDim ?? c.headDim),
    makeBatch(counts, to, cache.table, device),
  )
}

export function attentionOptions(c: Case, p: Problem, device: DeviceLike): ops.AttentionOptions {
  return {
    ...(c.scale !== undefined && { scale: c.scale }),
    causal: c.causal ?? true,
    window: c.window ?? 0,
    softcap: c.softcap ?? 0,
    roundWeights: c.roundWeights ?? false,
    alibiSlopes: c.alibi ? Tensor.from(p.slopes, { device }) : undefined,
    sinks: c.sinks ? Tensor.from(p.sinks, { device }) : undefined,
  }
}

/** The library's answer for the whole case at once. */
export async function runAttention(c: Case, p: Problem, device: DeviceLike): Promise<Float32Array> {
  const cache = makeCache(c, device)
  fillCache(
    c,
    p,
    cache,
    c.lengths.map(() => 0),
    c.lengths,
    device,
  )
  const tokens = c.queries.reduce((a, b) => a + b, 0)
  const q = Tensor.from(p.q, { shape: [tokens, c.heads, c.headDim], device }).to(c.dtype ?? 'float32')
  const batch = makeBatch(c.queries, c.lengths, cache.table, device)
  return ops.pagedAttention(q, cache.keys, cache.values, batch, attentionOptions(c, p, device)).floats()
}
