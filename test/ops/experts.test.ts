/** Products for the experts that tokens have chosen, against each expert's own layer for its tokens. */
import {
  devices,
  Linear,
  Linear4bit,
  Linear8bit,
  noGrad,
  ops,
  Tensor,
  tidy,
  type Device,
  type DType,
} from '../../lib/index.js'
import { rejection, thrown } from '../support/errors.js'
import { FLOATS, noise, relativeError, TOLERANCE, uniform, type FloatDType } from '../support/reference.js'

const FORMS: [string, (k: number, n: number, options: { device: Device; bias: boolean }) => Linear][] = [
  ['dense', (k, n, options) => new Linear(k, n, options)],
  [
    'nf4',
    (k, n, options) => new Linear4bit(k, n, { ...options, quantType: 'nf4', compressStatistics: false }),
  ],
  ['nested fp4', (k, n, options) => new Linear4bit(k, n, { ...options, quantType: 'fp4' })],
  ['nf4 in blocks of 128', (k, n, o) => new Linear4bit(k, n, { ...o, quantType: 'nf4', blocksize: 128 })],
  ['int8', (k, n, options) => new Linear8bit(k, n, options)],
  ['int8 with outliers', (k, n, options) => new Linear8bit(k, n, { ...options, threshold: 0.95 })],
  [
    'int8 as Python rounds',
    (k, n, options) => new Linear8bit(k, n, { ...options, threshold: 0.9, bnbExact: true }),
  ],
]

/** Distinct ids [tokens, k] of `count` experts; with `few` experts alone, and some with all of the tokens. */
function randomIds(tokens: number, k: number, count: number, seed: number, few = count): Int32Array {
  const random = uniform(seed)
  return Int32Array.from(
    Array.from({ length: tokens }, () => {
      const left = Array.from({ length: few }, (_, e) => e)
      return Array.from({ length: k }, () => left.splice(Math.floor(random() * left.length), 1)[0]!)
    }).flat(),
  )
}

interface Case {
  tokens: number
  k: number
  ids: Int32Array
  layers: Linear[]
}

function weightsOf(layers: readonly Linear[]): ops.ExpertWeights {
  return ops.expertWeights(layers.map((layer) => layer.expertWeight()!))!
}

/** Rows of x that the pairs of an expert take. */
function rowsOf({ ids, k }: Case, rows: number, expert: number): number[] {
  return [...ids.keys()]
    .filter((p) => ids[p] === expert)
    .map((p) => (rows === ids.length ? p : Math.floor(p / k)))
}

/** What the layers give, pair by pair. */
async function expected(of: Case, x: Tensor): Promise<Float32Array> {
  const n = of.layers[0]!.outFeatures
  const all = new Float32Array(of.ids.length * n)
  for (const [e, layer] of of.layers.entries()) {
    const rows = rowsOf(of, x.shape[0]!, e)
    if (rows.length === 0) continue
    using y = noGrad(() =>
      tidy(() => layer.forward(ops.gatherRows(x, Tensor.from(Int32Array.from(rows), { device: x.device })))),
    )
    const values = await y.floats()
    const pairs = [...of.ids.keys()].filter((p) => of.ids[p] === e)
    pairs.forEach((p, i) => all.set(values.subarray(i * n, (i + 1) * n), p * n))
  }
  return all
}

describe.each(devices())('experts on %s', (device) => {
  /** One that some form has a kernel for. */
  const common: FloatDType = device.type === 'cpu' ? 'float32' : 'bfloat16'
  const idsTensor = ({ ids, tokens, k }: Case) => Tensor.from(ids, { shape: [tokens, k], device })
  const input = (rows: number, k: number, dtype: DType, seed = 3) =>
    tidy(() => Tensor.from(noise(rows * k, seed), { shape: [rows, k], device }).to(dtype))

  /** The op's result, or undefined where the device has no kernel and says so. */
  async function result(weights: ops.ExpertWeights, dtype: DType, pairs: number, run: () => Tensor) {
    const takes = ops.takesExperts(weights, dtype, pairs)
    using y = run()
    if (takes) return await y.floats()
    expect((await rejection(y.floats())).code).toBe('ERR_HALFBYTE_UNSUPPORTED')
    expect(device.type).not.toBe('cpu')
    return undefined
  }

  describe.each(FORMS)('%s', (name, make) => {
    const limit = (dtype: FloatDType) => (name.startsWith('int8') ? 2e-3 : 2e-6) + 2 * TOLERANCE[dtype]

    describe.each(FLOATS)('x %s', (dtype) => {
      it.each([
        [1, 2, 8, 64, 256, false],
        [1, 8, 24, 48, 768, false],
        [3, 4, 6, 80, 320, true],
        [16, 4, 32, 32, 512, true],
        [40, 2, 5, 96, 256, false],
        [70, 3, 7, 33, 71, true],
      ] as const)(
        '%i tokens to %i of %i experts [%i, %i], bias %s',
        async (tokens, k, count, n, inner, bias) => {
          const layers = Array.from({ length: count }, () => make(inner, n, { device, bias }))
          const of: Case = { tokens, k, layers, ids: randomIds(tokens, k, count, n) }
          using ids = idsTensor(of)
          for (const rows of [tokens, tokens * k]) {
            using x = input(rows, inner, dtype)
            const y = await result(weightsOf(layers), dtype, tokens * k, () =>
              ops.linearExperts(x, ids, weightsOf(layers)),
            )
            if (y) expect(relativeError(y, await expected(of, x))).toBeLessThan(limit(dtype))
          }
          for (const layer of layers) layer.dispose()
        },
      )
    })

    it('gated, when all tokens go to a few, and experts have none', async () => {
      const [tokens, k, count, n, inner] = [9, 3, 12, 64, 256]
      const [gate, up] = [0, 1].map(() =>
        Array.from({ length: count }, () => make(inner, n, { device, bias: true })),
      )
      const of = { tokens, k, ids: randomIds(tokens, k, count, 5, 4) }
      using ids = idsTensor({ ...of, layers: [] })
      using x = input(tokens, inner, common)
      const y = await result(weightsOf(gate!), common, tokens * k, () =>
        ops.linearExpertsGated(x, ids, weightsOf(gate!), weightsOf(up!), 'silu'),
      )
      if (y) {
        const g = await expected({ ...of, layers: gate! }, x)
        const u = await expected({ ...of, layers: up! }, x)
        const silu = g.map((v, i) => (v / (1 + Math.exp(-v))) * u[i]!)
        expect(relativeError(y, silu)).toBeLessThan(limit(common))
      }
      for (const layer of [...gate!, ...up!]) layer.dispose()
    })

    it('ids that are none give NaN, doubled ones and no tokens are no matter', async () => {
      const layers = Array.from({ length: 3 }, () => make(256, 64, { device, bias: false }))
      using x = input(2, 256, common)
      const of = { tokens: 2, k: 4, ids: Int32Array.of(2, 3, 0, -1, 1, 1, 1, 2 ** 31 - 1), layers }
      using ids = idsTensor(of)
      const y = await result(weightsOf(layers), common, 8, () => ops.linearExperts(x, ids, weightsOf(layers)))
      if (y) {
        const wanted = await expected(of, x)
        for (const p of [0, 2, 4, 5, 6]) {
          const row = (values: Float32Array) => values.subarray(p * 64, (p + 1) * 64)
          expect(relativeError(row(y), row(wanted))).toBeLessThan(limit(common))
        }
        for (const p of [1, 3, 7])
          expect([...y.subarray(p * 64, (p + 1) * 64)].every(Number.isNaN)).toBe(true)
      }
      using none = input(0, 256, common)
      using no = Tensor.empty([0, 4], 'int32', device)
      const empty = await result(weightsOf(layers), common, 0, () =>
        ops.linearExperts(none, no, weightsOf(layers)),
      )
      expect(empty?.length ?? 0).toBe(0)
      for (const layer of layers) layer.dispose()
    })
  })

  it('have more rows than a block keeps sums of', async () => {
    const layer = new Linear4bit(256, 40960, { device, bias: false, quantType: 'nf4' })
    const layers = [layer, layer.copyTo(device)]
    const of: Case = { tokens: 32, k: 2, layers, ids: randomIds(32, 2, 2, 7) }
    using ids = idsTensor(of)
    using x = input(32, 256, 'bfloat16')
    const weights = weightsOf(layers)
    const y = await result(weights, 'bfloat16', 64, () => ops.linearExperts(x, ids, weights))
    if (y) expect(relativeError(y, await expected(of, x))).toBeLessThan(2 * TOLERANCE.bfloat16)
    for (const each of layers) each.dispose()
  }, 60_000)

  it('are chosen when a recording is replayed', async () => {
    const layers = Array.from(
      { length: 8 },
      () => new Linear4bit(256, 64, { device, bias: false, quantType: 'nf4' }),
    )
    const weights = weightsOf(layers)
    const dtype = common
    using x = input(2, 256, dtype)
    using scores = Tensor.zeros([2, 8], 'float32', device)
    const run = () => {
      const { ids, weights: shares } = ops.routeTokens(scores, {
        perToken: 2,
        softmax: true,
        normalize: true,
      })
      return tidy(() => ops.weightedSum(ops.linearExperts(x, ids, weights), shares))
    }
    if (!ops.takesExperts(weights, dtype, 4)) return
    let y!: Tensor
    const graph = device.capture(() => (y = run()))
    for (const seed of [1, 2, 3]) {
      scores.write(noise(16, seed))
      graph.replay()
      using now = run()
      expect(await y.floats()).toEqual(await now.floats())
    }
    graph.dispose()
    y.dispose()
    for (const layer of layers) layer.dispose()
  })

  describe('routes', () => {
    const scoresOf = (tokens: number, experts: number) =>
      noise(tokens * experts, tokens + experts).map((v) => 4 * v)
    const routed = async (scores: Float32Array, experts: number, options: ops.RouteOptions) => {
      using s = Tensor.from(scores, { shape: [scores.length / experts, experts], device })
      const { ids, weights } = ops.routeTokens(s, options)
      const [i, w] = [[...(await ids.data())].map(Number), [...(await weights.floats())]]
      ids.dispose()
      weights.dispose()
      return { ids: i, weights: w }
    }

    it.each([
      [1, 128, 8, true],
      [5, 8, 2, false],
      [33, 60, 4, true],
      [3, 300, 300, false],
      [2, 1, 1, true],
    ])('%i tokens, %i experts, %i of them, normalised %s', async (tokens, experts, perToken, normalize) => {
      const scores = scoresOf(tokens, experts)
      const { ids, weights } = await routed(scores, experts, {
        perToken,
        normalize,
        softmax: true,
        scale: 1.5,
      })
      for (let t = 0; t < tokens; t++) {
        const row = scores.subarray(t * experts, (t + 1) * experts)
        const order = [...row.keys()].sort((a, b) => row[b]! - row[a]! || a - b)
        const best = order.slice(0, perToken).sort((a, b) => a - b)
        expect(ids.slice(t * perToken, (t + 1) * perToken)).toEqual(best)
        const exps = [...row].map((v) => Math.exp(v))
        const sum = (normalize ? best : order).reduce((all, e) => all + exps[e]!, 0)
        best.forEach((e, j) => expect(weights[t * perToken + j]).toBeCloseTo((1.5 * exps[e]!) / sum, 5))
      }
    })

    it('by another choice than the scores, the first of equals, NaN last', async () => {
      const scores = Float32Array.of(0.5, 0.25, 1, 2, 3, 4)
      using choice = Tensor.from(Float32Array.of(1, NaN, 1, -Infinity, 1, 0), { shape: [1, 6], device })
      const some = await routed(scores, 6, { perToken: 2, choice, scale: 2 })
      expect(some).toEqual({ ids: [0, 2], weights: [1, 2] })
      const most = await routed(scores, 6, { perToken: 5, choice, normalize: true, tiny: 1 })
      expect(most.ids).toEqual([0, 1, 2, 4, 5])
      ;[0.5, 0.25, 1, 3, 4].forEach((v, i) => expect(most.weights[i]).toBeCloseTo(v / 9.75, 6))
      const nan = await routed(Float32Array.of(NaN, NaN, NaN), 3, { perToken: 2 })
      expect(nan.ids).toEqual([0, 1])
    })
  })

  it.each(FLOATS)('sums %s results in order', async (dtype) => {
    for (const [tokens, k, n] of [
      [1, 8, 2048],
      [5, 3, 77],
      [64, 2, 130],
    ] as const) {
      using x = input(tokens * k, n, dtype)
      using residual = input(tokens, n, dtype, 9)
      const shares = noise(tokens * k, 4)
      using weights = Tensor.from(shares, { shape: [tokens, k], device })
      using y = ops.weightedSum(x, weights, residual)
      using plain = ops.weightedSum(x, weights)
      const [values, first] = [await x.floats(), await residual.floats()]
      const sums = Float64Array.from({ length: tokens * n }, (_, i) => {
        const [t, c] = [Math.floor(i / n), i % n]
        let sum = 0
        for (let j = 0; j < k; j++) sum += shares[t * k + j]! * values[(t * k + j) * n + c]!
        return sum
      })
      expect(relativeError(await plain.floats(), sums)).toBeLessThan(TOLERANCE[dtype])
      const added = sums.map((v, i) => v + first[i]!)
      expect(relativeError(await y.floats(), added)).toBeLessThan(TOLERANCE[dtype])
    }
  })

  it('refuse what does not fit', () => {
    const layers = [64, 64].map((n) => new Linear(256, n, { device }))
    const other = new Linear(256, 32, { device })
    const packed = new Linear4bit(256, 64, { device })
    const weights = noGrad(() => weightsOf(layers))
    expect(ops.expertWeights([...layers, other].map((layer) => layer.expertWeight()!))).toBeUndefined()
    expect(ops.expertWeights([...layers, packed].map((layer) => layer.expertWeight()!))).toBeUndefined()
    expect(ops.expertWeights([])).toBeUndefined()
    using x = input(3, 256, 'float32')
    using ids = Tensor.from(new Int32Array(6), { shape: [3, 2], device })
    using wide = Tensor.from(new Int32Array(8), { shape: [4, 2], device })
    using flat = Tensor.from(new Int32Array(6), { device })
    using narrow = input(3, 128, 'float32')
    const refused = (run: () => unknown) => thrown(() => noGrad(() => run())).message
    expect(refused(() => ops.linearExperts(x, wide, weights))).toMatch(/x \[3, 256\].*ids \[4, 2\]/)
    expect(refused(() => ops.linearExperts(x, flat, weights))).toMatch(/ids are \[6\]/)
    expect(refused(() => ops.linearExperts(narrow, ids, weights))).toMatch(/\[64, 256\]/)
    expect(refused(() => ops.linearExperts(x, x, weights))).toMatch(/int32/)
    expect(refused(() => ops.linearExpertsGated(x, ids, weights, weightsOf([other, other]), 'silu'))).toMatch(
      /gate has 2/,
    )
    expect(refused(() => ops.routeTokens(x, { perToken: 257 }))).toMatch(/perToken is 257/)
    expect(refused(() => ops.weightedSum(x, x))).toMatch(/\[3, 256\]/)
    layers[0]!.weight.requiresGrad = true
    expect(thrown(() => ops.linearExperts(x, ids, weightsOf(layers))).code).toBe('ERR_HALFBYTE_USAGE')
    for (const layer of [...layers, other, packed]) layer.dispose()
  })
})
