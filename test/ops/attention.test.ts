import { devices, ops, Tensor, type DType } from '../../lib/index'
import { native } from '../../lib/native'
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
import { rejection } from '../support/errors'
import { relativeError, rounded } from '../support/reference'
import { itCompiled, runScript } from '../support/run'

const base = { heads: 4, kvHeads: 2, headDim: 16 }
const mixed = { queries: [1, 37, 0, 5, 1], lengths: [1, 100, 9, 5, 200] }
const everything = { ...base, window: 33, softcap: 2, alibi: true, sinks: true, scale: 0.5 }

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
  ['everything', { ...everything, ...mixed }],
  ['rounded weights', { ...base, ...mixed, roundWeights: true }],
  ['large scores', { ...base, ...mixed, scale: 60 }],
  ['values of another size', { ...base, ...mixed, headDim: 24, valueDim: 10 }],
  ['one element a head', { ...base, ...mixed, headDim: 1 }],
  ['an odd head size', { ...base, ...mixed, headDim: 67, valueDim: 131 }],
  ['head size 128', { ...base, ...mixed, headDim: 128 }],
  ['head size 8', { ...base, ...mixed, headDim: 8 }],
  ['head size 64', { ...base, ...mixed, headDim: 64 }],
  ['head size 80, values of 96', { ...base, ...mixed, headDim: 80, valueDim: 96 }],
  ['head size 256', { ...base, ...mixed, headDim: 256 }],
  ['head size 192, values of 128', { ...base, ...mixed, headDim: 192, valueDim: 128 }],
  ['head size 264', { ...base, ...mixed, headDim: 264 }],
  ['head size 512', { ...base, ...mixed, headDim: 512 }],
  ['an odd head size above 256', { ...base, ...mixed, headDim: 301, valueDim: 263 }],
  ['prefill, head size 64', { ...base, queries: [150], lengths: [181], headDim: 64 }],
  ['prefill, head size 128', { ...base, queries: [150], lengths: [181], headDim: 128 }],
  ['prefill, head size 256', { ...base, queries: [90], lengths: [121], headDim: 256 }],
  ['prefill, one head a group', { ...base, kvHeads: 4, queries: [270], lengths: [300] }],
  ['prefill, 3 heads a group', { ...base, heads: 3, kvHeads: 1, queries: [150], lengths: [150] }],
  ['prefill, not causal', { ...base, queries: [100], lengths: [290], causal: false }],
  ['prefill, sliding window', { ...base, queries: [300], lengths: [300], window: 70 }],
  ['prefill, everything', { ...everything, queries: [200], lengths: [333] }],
  ['prefill of the end of a long sequence', { ...base, queries: [20], lengths: [1500] }],
  [
    'prefill of the end, everything',
    { ...everything, kvHeads: 1, queries: [20], lengths: [1500], window: 900 },
  ],
  ['prefill of many short sequences', { ...base, queries: [9, 8, 7, 10, 9], lengths: [9, 8, 7, 10, 9] }],
  ['prefill longer than the sequence', { ...base, queries: [40, 3], lengths: [20, 1] }],
  ['few tokens of one long sequence', { ...everything, queries: [3], lengths: [1500], window: 700 }],
  ['few tokens of each sequence', { ...base, queries: [4, 4, 2], lengths: [300, 4, 41] }],
  ['more sequences than tokens', { ...base, queries: [0, 3, 0, 0, 1], lengths: [7, 130, 0, 5, 33] }],
  ['decode with everything', { ...everything, queries: [1, 1, 1], lengths: [3, 700, 1200] }],
  ['decode of head size 64', { ...base, queries: [1, 1], lengths: [3, 700], headDim: 64 }],
  ['decode of head size 128', { ...base, queries: [1, 1], lengths: [3, 700], headDim: 128 }],
  ['decode of head size 256', { ...base, queries: [1, 1], lengths: [3, 400], headDim: 256 }],
  ['130 heads on one key head', { ...base, heads: 130, kvHeads: 1, queries: [1, 9], lengths: [40, 70] }],
  ['a negative scale', { ...base, ...mixed, scale: -0.5 }],
  ['blocks of 1', { ...base, ...mixed, blockLen: 1 }],
  ['blocks of 3', { ...base, ...mixed, blockLen: 3 }],
  ['blocks of 256', { ...base, ...mixed, blockLen: 256 }],
]
const bounds: [DType, number][] = [
  ['float32', 1e-5],
  ['float16', 2e-3],
  ['bfloat16', 1e-2],
]

/** Between two ways through the same sums: a rounding of the result. */
const chunkBounds: [DType, number][] = [
  ['float32', 1e-6],
  ['float16', 1e-3],
  ['bfloat16', 6e-3],
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

  // elsewhere weights are rounded in any case, relative to the largest score of whatever part of the keys comes first
  const onCpu = device.type === 'cpu' ? it : it.skip
  onCpu.each([
    ['few queries', [1, 2], [61, 40]],
    ['many queries', [60], [60]],
  ])('rounds weights to float16 when asked to, %s', async (_, queries, lengths) => {
    const c: Case = { ...base, queries, lengths, dtype: 'float16' }
    const p = await makeProblem(c, device)
    /** The share of results that are the float16 next to the reference. */
    const share = async (asked: boolean, expected: boolean) => {
      const y = await runAttention({ ...c, roundWeights: asked }, p, device)
      const wanted = referenceAttention({ ...c, roundWeights: expected }, p)
      return y.filter((v, i) => v === rounded(wanted[i]!, 'float16')).length / y.length
    }
    expect(await share(true, true)).toBeGreaterThan(0.98)
    expect(await share(false, false)).toBeGreaterThan(0.98)
    expect(await share(true, false)).toBeLessThan(0.9)
  })

  it.each(chunkBounds)(
    'gives the same in %s chunks, and token by token, as at once',
    async (dtype, bound) => {
      const c: Case = { ...base, queries: [90, 41], lengths: [90, 41], blockLen: 8, window: 50, dtype }
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
          }).to(dtype)
          const batch = makeBatch(counts, to, cache.table, device)
          const y = await ops
            .pagedAttention(q, cache.keys, cache.values, batch, attentionOptions(c, p, device))
            .floats()
          found.set(y.subarray(0, counts[0]! * row), starts[0])
          found.set(y.subarray(counts[0]! * row), starts[1])
        }
        expect(relativeError(found, whole)).toBeLessThan(bound)
      }
    },
  )

  it.each(bounds)('takes %s queries with a token stride', async (dtype, bound) => {
    const c: Case = { ...base, ...mixed, dtype }
    const p = await makeProblem(c, device)
    const tokens = 44
    const row = c.heads * c.headDim
    const wide = new Float32Array(tokens * row * 2).fill(NaN)
    for (let t = 0; t < tokens; t++) wide.set(p.q.subarray(t * row, (t + 1) * row), t * 2 * row)
    const cache = makeCache(c, device)
    fillCache(c, p, cache, [0, 0, 0, 0, 0], c.lengths, device)
    const q = Tensor.from(wide, { shape: [tokens, 2 * c.heads, c.headDim], device })
      .to(dtype)
      .slice(1, 0, c.heads)
    const batch = makeBatch(c.queries, c.lengths, cache.table, device)
    const y = await ops.pagedAttention(q, cache.keys, cache.values, batch).floats()
    expect(relativeError(y, referenceAttention(c, p))).toBeLessThan(bound)
  })

  it.each(bounds)('gives zeros to rows of %s that see no key', async (dtype) => {
    for (const queries of [[1], [3], [9]]) {
      for (const sinks of [false, true]) {
        const c: Case = { ...base, queries, lengths: [0], sinks, dtype }
        const y = await runAttention(c, await makeProblem(c, device), device)
        expect([...y].every((x) => x === 0)).toBe(true)
      }
    }
  })

  it.each(bounds)('gives zeros to tokens of %s behind the last sequence', async (dtype, bound) => {
    for (const queries of [[1], [2], [1, 1, 1, 1], [150], [40, 1]]) {
      const c: Case = { ...base, queries, lengths: queries.map((n) => n + 5), dtype }
      const p = await makeProblem(c, device)
      const cache = makeCache(c, device)
      const none = c.queries.map(() => 0)
      fillCache(c, p, cache, none, c.lengths, device)
      const [tokens, more] = [p.q.length / (c.heads * c.headDim), 3]
      const q = Tensor.full([tokens + more, c.heads, c.headDim], 1, dtype, device)
      const part = Tensor.from(p.q, { shape: [tokens, c.heads, c.headDim], device }).to(dtype)
      ops.copyInto(q.slice(0, 0, tokens), part)
      const batch = makeBatch(c.queries, c.lengths, cache.table, device)
      const y = await ops.pagedAttention(q, cache.keys, cache.values, batch).floats()
      const rest = y.length - (more * y.length) / (tokens + more)
      expect(relativeError(y.subarray(0, rest), referenceAttention(c, p))).toBeLessThan(bound)
      expect([...y.subarray(rest)].every((x) => x === 0)).toBe(true)
    }
  })

  it.each(bounds)(
    'leaves out positions of %s without a valid block, whatever is given',
    async (dtype, bound) => {
      const c: Case = { ...base, queries: [2, 40], lengths: [30, 40], blockLen: 4, dtype }
      const p = await makeProblem(c, device)
      const cache = makeCache(c, device)
      fillCache(c, p, cache, [0, 0], c.lengths, device)
      // the second block of both sequences points outside: attention over the other positions only
      const holes = cache.table.map((row, s) => row.map((b, i) => (i === 1 ? (s === 0 ? 1 << 30 : -5) : b)))
      const q = Tensor.from(p.q, { shape: [42, c.heads, c.headDim], device }).to(dtype)
      const y = await ops
        .pagedAttention(q, cache.keys, cache.values, makeBatch(c.queries, c.lengths, holes, device))
        .floats()
      const cut = (x: Float32Array, dim: number, lost: number) => {
        const out = x.slice()
        for (let j = 4; j < 8; j++) out.fill(lost, j * c.kvHeads * dim, (j + 1) * c.kvHeads * dim)
        return out
      }
      const expected = referenceWithHoles(c, { ...p, keys: p.keys.map((k) => cut(k, c.headDim, NaN)) })
      expect(relativeError(y, expected)).toBeLessThan(bound)

      const wild = makeBatch([2, 40], [1 << 30, -7], cache.table, device)
      expect((await ops.pagedAttention(q, cache.keys, cache.values, wild).floats()).length).toBe(y.length)
      const backwards = { ...wild, queryStarts: Tensor.from(Int32Array.from([900, -4, 1 << 30]), { device }) }
      expect((await ops.pagedAttention(q, cache.keys, cache.values, backwards).floats()).length).toBe(
        y.length,
      )
    },
  )

  it('takes slopes and sinks that are one number for all heads', async () => {
    const c: Case = { ...base, ...mixed, alibi: true, sinks: true }
    const p = await makeProblem(c, device)
    p.slopes.fill(0.125)
    p.sinks.fill(0.75)
    const cache = makeCache(c, device)
    fillCache(c, p, cache, [0, 0, 0, 0, 0], c.lengths, device)
    const q = Tensor.from(p.q, { shape: [44, c.heads, c.headDim], device })
    const batch = makeBatch(c.queries, c.lengths, cache.table, device)
    const [alibiSlopes, sinks] = [0.125, 0.75].map((x) =>
      Tensor.full([1], x, 'float32', device).expand(c.heads),
    )
    const y = await ops.pagedAttention(q, cache.keys, cache.values, batch, { alibiSlopes, sinks }).floats()
    expect(relativeError(y, referenceAttention(c, p))).toBeLessThan(1e-5)

    // the addon itself refuses them
    for (const extras of [
      [alibiSlopes!.handle, null],
      [null, sinks!.handle],
    ]) {
      const out = Tensor.empty(q.shape, 'float32', device)
      const ragged = [batch.queryStarts, batch.lengths, batch.blockTable]
      const inputs = [q, cache.keys, cache.values, ...ragged].map(({ handle }) => handle)
      const op = native.ops.indexOf('paged_attention')
      device.native.run(op, [out.handle], [...inputs, ...extras], [0.25, 1, 0, 0, 0])
      expect((await rejection(out.data())).code).toBe('ERR_HALFBYTE_SHAPE')
    }
  })

  // what a smaller GPU has: a build for one gives numbers, any other says that it has no code for so little
  const onGpu = device.type === 'cuda' ? itCompiled : it.skip
  onGpu.each(['64', '99'])(
    'gives the numbers or refuses within %s KiB of shared memory',
    async (kib) => {
      const env = { HALFBYTE_CUDA_SHARED: kib }
      const { stdout, ...rest } = await runScript('little-shared.js', [device.name], [], { env })
      expect(rest).toEqual({ code: 0, signal: null, stderr: '' })
      const lines = stdout.trim().split('\n')
      expect(lines.length).toBe(9)
      for (const line of lines) expect(line).toMatch(/^\w+ \d+ (ok|ERR_HALFBYTE_UNSUPPORTED)$/)
    },
    300_000,
  )

  it('works without tokens and without sequences', async () => {
    const c: Case = { ...base, queries: [0, 0], lengths: [3, 0] }
    const p = await makeProblem(c, device)
    expect((await runAttention(c, p, device)).length).toBe(0)
    const keys = Tensor.zeros([1, 4, 2, 16], 'float32', device)
    const empty = makeBatch([], [], [], device)
    const q = Tensor.empty([0, 4, 16], 'float32', device)
    expect((await ops.pagedAttention(q, keys, keys, empty).data()).length).toBe(0)
  })

  it.each(bounds)('lets a NaN key of %s reach only the rows that see it', async (dtype) => {
    for (const queries of [
      [1, 1],
      [3, 1],
      [20, 20],
    ]) {
      const c: Case = { ...base, queries, lengths: [20, 2000], dtype }
      const p = await makeProblem(c, device)
      p.keys[0]![3] = NaN
      const y = await runAttention(c, p, device)
      const row = c.heads * c.headDim
      const first = y.subarray(0, queries[0]! * row)
      const seen = Array.from(first, (_, i) => i % row < row / 2)
      expect(first.every((x, i) => Number.isNaN(x) === seen[i])).toBe(true)
      expect(y.subarray(first.length).some(Number.isNaN)).toBe(false)
    }
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
