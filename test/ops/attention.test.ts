import { devices, ops, Tensor, type DType } from '../../lib/index'
import {
  attentionOptions,
  fillCache,
  makeBatch,
  makeCache,
  makeProblem,
  referenceAttention,
  runAttention,
  type Case,
} from '../support/attention'
import { relativeError } from '../support/reference'

const base = { heads: 4, kvHeads: 2, headDim: 16 }
const mixed = { queries: [1, 37, 0, 5, 1], lengths: [1, 100, 9, 5, 200] }

const cases: [string, Case][] = [
  ['decode of one sequence', { ...base, queries: [1], lengths: [300] }],
  ['decode of one long sequence, one key head', { ...base, kvHeads: 1, queries: [1], lengths: [2100] }],
  ['decode of many sequences', { ...base, queries: [1, 1, 1, 1, 1, 1], lengths: [1, 15, 16, 17, 64, 129] }],
  ['prefill', { ...base, queries: [150], lengths: [150] }],
  ['lengths of every kind', { ...base, ...mixed }],
  ['no grouping', { ...base, kvHeads: 4, ...mixed }],
  ['71 heads on one key head', { ...base, heads: 71, kvHeads: 1, queries: [1, 3], lengths: [40, 70] }],
  ['3 heads a group', { ...base, heads: 6, ...mixed }],
  ['5 heads a group', { ...base, heads: 5, kvHeads: 1, ...mixed }],
  ['7 heads a group', { ...base, heads: 7, kvHeads: 1, ...mixed }],
  ['not causal', { ...base, ...mixed, causal: false }],
  ['sliding window', { ...base, ...mixed, window: 20 }],
  ['sliding window of 1', { ...base, ...mixed, window: 1 }],
  ['softcap', { ...base, ...mixed, softcap: 1.5 }],
  ['ALiBi', { ...base, ...mixed, alibi: true }],
  ['sinks', { ...base, ...mixed, sinks: true }],
  ['sinks and splits', { ...base, kvHeads: 1, queries: [1], lengths: [1500], sinks: true }],
  ['everything', { ...base, ...mixed, window: 33, softcap: 2, alibi: true, sinks: true, scale: 0.5 }],
  ['large scores', { ...base, ...mixed, scale: 60 }],
  ['values of another size', { ...base, ...mixed, headDim: 24, valueDim: 10 }],
  ['one element a head', { ...base, ...mixed, headDim: 1 }],
  ['an odd head size', { ...base, ...mixed, headDim: 67, valueDim: 131 }],
  ['head size 128', { ...base, ...mixed, headDim: 128 }],
  ['blocks of 1', { ...base, ...mixed, blockLen: 1 }],
  ['blocks of 3', { ...base, ...mixed, blockLen: 3 }],
  ['blocks of 256', { ...base, ...mixed, blockLen: 256 }],
]
const bounds: [DType, number][] = [
  ['float32', 1e-5],
  ['float16', 2e-3],
  ['bfloat16', 1e-2],
]

describe.each(devices())('paged attention on %s', (device) => {
  describe.each(bounds)('%s', (dtype, bound) => {
    it.each(cases)('%s', async (_, options) => {
      const c = { ...options, dtype }
      const p = await makeProblem(c, device)
      const y = await runAttention(c, p, device)
      expect(relativeError(y, referenceAttention(c, p))).toBeLessThan(bound)
    })
  })

  it('gives the same in chunks, and token by token, as at once', async () => {
    const c: Case = { ...base, queries: [90, 41], lengths: [90, 41], blockLen: 8, window: 50 }
    const p = await makeProblem(c, device)
    const whole = await runAttention(c, p, device)
    const row = c.heads * c.headDim
    for (const chunk of [1, 7, 64]) {
      const cache = makeCache(c, device)
      const found = new Float32Array(whole.length)
      for (let at = 0; at < 90; at += chunk) {
        const from = c.lengths.map((n) => Math.min(at, n))
        const to = c.lengths.map((n) => Math.min(at + chunk, n))
        fillCache(c, p, cache, from, to, device)
        const starts = from.map((n, s) => (s === 0 ? n : 90 + n) * row)
        const counts = to.map((n, s) => n - from[s]!)
        const rows = starts.map((start, s) => [...p.q.subarray(start, start + counts[s]! * row)])
        const q = Tensor.from(Float32Array.from(rows.flat()), {
          shape: [counts[0]! + counts[1]!, c.heads, c.headDim],
          device,
        })
        const batch = makeBatch(counts, to, cache.table, device)
        const y = await ops
          .pagedAttention(q, cache.keys, cache.values, batch, attentionOptions(c, p, device))
          .floats()
        found.set(y.subarray(0, counts[0]! * row), starts[0])
        found.set(y.subarray(counts[0]! * row), starts[1])
      }
      expect(relativeError(found, whole)).toBeLessThan(1e-6)
    }
  })

  it('takes queries with a token stride', async () => {
    const c: Case = { ...base, ...mixed }
    const p = await makeProblem(c, device)
    const tokens = 44
    const row = c.heads * c.headDim
    const wide = new Float32Array(tokens * row * 2).fill(NaN)
    for (let t = 0; t < tokens; t++) wide.set(p.q.subarray(t * row, (t + 1) * row), t * 2 * row)
    const cache = makeCache(c, device)
    fillCache(c, p, cache, [0, 0, 0, 0, 0], c.lengths, device)
    const q = Tensor.from(wide, { shape: [tokens, 2 * c.heads, c.headDim], device }).slice(1, 0, c.heads)
    const batch = makeBatch(c.queries, c.lengths, cache.table, device)
    const y = await ops.pagedAttention(q, cache.keys, cache.values, batch).floats()
    expect(relativeError(y, referenceAttention(c, p))).toBeLessThan(1e-5)
  })

  it('gives zeros to rows that see no key', async () => {
    for (const queries of [[1], [9]]) {
      for (const sinks of [false, true]) {
        const c: Case = { ...base, queries, lengths: [0], sinks }
        const y = await runAttention(c, await makeProblem(c, device), device)
        expect([...y].every((x) => x === 0)).toBe(true)
      }
    }
  })

  it('leaves out positions without a valid block, whatever the table and the lengths hold', async () => {
    const c: Case = { ...base, queries: [2, 40], lengths: [30, 40], blockLen: 4 }
    const p = await makeProblem(c, device)
    const cache = makeCache(c, device)
    fillCache(c, p, cache, [0, 0], c.lengths, device)
    // the second block of both sequences points outside: attention over the other positions only
    const holes = cache.table.map((row, s) => row.map((b, i) => (i === 1 ? (s === 0 ? 1 << 30 : -5) : b)))
    const q = Tensor.from(p.q, { shape: [42, c.heads, c.headDim], device })
    const y = await ops
      .pagedAttention(q, cache.keys, cache.values, makeBatch(c.queries, c.lengths, holes, device))
      .floats()
    const cut = (x: Float32Array, dim: number, lost: number) => {
      const out = x.slice()
      for (let j = 4; j < 8; j++) out.fill(lost, j * c.kvHeads * dim, (j + 1) * c.kvHeads * dim)
      return out
    }
    const expected = referenceWithHoles(c, { ...p, keys: p.keys.map((k) => cut(k, c.headDim, NaN)) })
    expect(relativeError(y, expected)).toBeLessThan(1e-5)

    const wild = makeBatch([2, 40], [1 << 30, -7], cache.table, device)
    expect((await ops.pagedAttention(q, cache.keys, cache.values, wild).floats()).length).toBe(y.length)
    const backwards = { ...wild, queryStarts: Tensor.from(Int32Array.from([900, -4, 1 << 30]), { device }) }
    const none = await ops.pagedAttention(q, cache.keys, cache.values, backwards).floats()
    expect([...none].every((x) => x === 0)).toBe(true)
  })

  it('works without tokens and without sequences', async () => {
    const c: Case = { ...base, queries: [0, 0], lengths: [3, 0] }
    const p = await makeProblem(c, device)
    expect((await runAttention(c, p, device)).length).toBe(0)
    const keys = Tensor.zeros([1, 4, 2, 16], 'float32', device)
    const empty = makeBatch([], [], [], device)
    const q = Tensor.empty([0, 4, 16], 'float32', device)
    expect((await ops.pagedAttention(q, keys, keys, empty).data()).length).toBe(0)
  })

  it('lets a NaN key reach only the rows that see it', async () => {
    const c: Case = { ...base, queries: [1, 1], lengths: [20, 20] }
    const p = await makeProblem(c, device)
    p.keys[0]![3] = NaN
    const y = await runAttention(c, p, device)
    const row = c.heads * c.headDim
    expect([...y.subarray(0, row / 2)].every(Number.isNaN)).toBe(true)
    expect([...y.subarray(row)].some(Number.isNaN)).toBe(false)
  })

  it('refuses operands that do not fit', () => {
    const q = Tensor.zeros([1, 4, 16], 'float32', device)
    const keys = Tensor.zeros([1, 4, 2, 16], 'float32', device)
    const three = Tensor.zeros([1, 4, 3, 16], 'float32', device)
    const batch = makeBatch([1], [1], [[0]], device)
    expect(() => ops.pagedAttention(q, three, three, batch)).toThrow(/4 query heads do not share 3/)
    const halves = Tensor.zeros([1, 4, 2, 16], 'float16', device)
    expect(() => ops.pagedAttention(q, halves, halves, batch)).toThrow(/float16/)
    const two = { ...batch, lengths: Tensor.from(Int32Array.from([1, 1]), { device }) }
    expect(() => ops.pagedAttention(q, keys, keys, two)).toThrow(/do not belong together/)
  })
})

/** Attention where a key that holds NaN is not there. */
function referenceWithHoles(c: Case, p: Awaited<ReturnType<typeof makeProblem>>): Float64Array {
  const rows: number[] = []
  let token = 0
  c.queries.forEach((count, s) => {
    for (let i = 0; i < count; i++, token++) {
      const position = c.lengths[s]! - count + i
      const row = (x: Float32Array, j: number) =>
        x.subarray(j * c.kvHeads * c.headDim, (j + 1) * c.kvHeads * c.headDim)
      const left = Array.from({ length: position + 1 }, (_, j) => j).filter(
        (j) => !Number.isNaN(row(p.keys[s]!, j)[0]),
      )
      const only = (x: Float32Array) => Float32Array.from(left.flatMap((j) => [...row(x, j)]))
      const size = c.heads * c.headDim
      const one: Case = { ...c, queries: [1], lengths: [left.length] }
      const y = referenceAttention(one, {
        ...p,
        q: p.q.subarray(token * size, (token + 1) * size),
        keys: [only(p.keys[s]!)],
        values: [only(p.values[s]!)],
      })
      rows.push(...y)
    }
  })
  return Float64Array.from(rows)
}
