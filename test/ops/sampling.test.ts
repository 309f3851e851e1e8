import { devices, ops, Tensor, type DeviceLike, type DType } from '../../lib/index'
import { noise } from '../support/reference'
import { probabilities, row, uniform, type SamplingParams } from '../support/sampling'

const { abs, cos, exp, log, max, sqrt, PI } = Math // looking up globals is slow inside jest

/** Normally distributed logits. */
function gaussian(n: number, seed: number, deviation = 2): Float32Array {
  const u = noise(2 * n, seed)
  const x = new Float32Array(n)
  for (let i = 0; i < n; i++) {
    const radius = sqrt(-2 * log((u[2 * i]! + 1) / 2 + 1e-9))
    x[i] = deviation * radius * cos(PI * u[2 * i + 1]!)
  }
  return x
}

/** Largest element, and the sum of exp(x - largest). */
function softmaxSum(x: Float32Array): [number, number] {
  let [top, sum] = [-Infinity, 0]
  for (let i = 0; i < x.length; i++) top = max(top, x[i]!)
  for (let i = 0; i < x.length; i++) sum += exp(x[i]! - top)
  return [top, sum]
}

/** `draws` tokens of the same logits, with counters 0, 1, ... */
async function draw(
  device: DeviceLike,
  logits: Float32Array,
  params: SamplingParams,
  draws: number,
  { seed = 1n, seen = undefined as Uint8Array | undefined, dtype = 'float32' } = {},
): Promise<Int32Array> {
  const n = logits.length
  const repeat = <T extends Float32Array | Uint8Array>(x: T, into: T): T => {
    for (let i = 0; i < draws; i++) into.set(x, i * n)
    return into
  }
  const shape = [draws, n]
  const tokens = ops.sample(
    Tensor.from(repeat(logits, new Float32Array(draws * n)), { shape, device }).to(dtype),
    {
      params: Tensor.from(Float32Array.from(Array.from({ length: draws }, () => row(params)).flat()), {
        shape: [draws, 5],
        device,
      }),
      rng: Tensor.from(
        BigInt64Array.from(Array.from({ length: draws }, (_, i) => [seed, BigInt(i)]).flat()),
        {
          shape: [draws, 2],
          device,
        },
      ),
      seen: seen && Tensor.from(repeat(seen, new Uint8Array(draws * n)), { shape, device }),
    },
  )
  return (await tokens.data()) as Int32Array
}

/** Every token, drawn with counters 0, 1, ..., is where its random number falls. */
function expectByDefinition(tokens: Int32Array, chances: Float64Array, seed: bigint, slack: number): void {
  tokens.forEach((token, i) => {
    const u = uniform(BigInt.asUintN(64, seed), BigInt(i))
    let below = 0
    for (let j = 0; j < token; j++) below += chances[j]!
    expect(chances[token]).toBeGreaterThan(0)
    expect(u).toBeGreaterThanOrEqual(below - slack)
    expect(u).toBeLessThan(below + chances[token]! + slack)
  })
}

describe.each(devices())('choosing tokens on %s', (device) => {
  describe('argmax', () => {
    it.each(['float32', 'float16', 'bfloat16'] as DType[])('of %s', async (dtype) => {
      for (const n of [1, 2, 15, 16, 17, 33, 1000, 128256]) {
        const x = Tensor.from(gaussian(3 * n, n), { shape: [3, n], device }).to(dtype)
        const values = await x.floats()
        const expected = [0, 1, 2].map((r) => {
          const part = values.subarray(r * n, (r + 1) * n)
          return part.indexOf(softmaxSum(part)[0])
        })
        expect([...(await ops.argmax(x).data())]).toEqual(expected)
      }
    })

    it('takes the lowest index on ties, and NaN for -Infinity', async () => {
      const of = async (x: number[]) => ops.argmax(Tensor.from(Float32Array.from(x), { device })).item()
      const many = new Array<number>(100).fill(1)
      expect(await of(many)).toBe(0)
      many[37] = many[99] = 2
      expect(await of(many)).toBe(37)
      expect(await of([NaN, 1, 3, NaN, 3])).toBe(2)
      expect(await of([NaN, NaN])).toBe(0)
      expect(await of([-Infinity, NaN, -Infinity])).toBe(0)
      expect(await of([1, Infinity, 5])).toBe(1)
      expect(await of([-0, 0])).toBe(0)
      // parts of a long row that different threads look at
      const long = gaussian(100003, 9)
      for (const i of [99990, 70001, 50000, 12345]) {
        long[i] = 50
        expect(await of([...long])).toBe(i)
      }
    })
  })

  describe('crossEntropy', () => {
    it.each([
      ['float32', 'int32'],
      ['float32', 'int64'],
      ['float16', 'int32'],
      ['bfloat16', 'int32'],
    ] as [DType, DType][])('of %s, targets %s', async (dtype, targetType) => {
      for (const n of [1, 7, 16, 129, 50000]) {
        const rows = 5
        const x = Tensor.from(gaussian(rows * n, n, 5), { shape: [rows, n], device }).to(dtype)
        const targets = [0, n - 1, n >> 1, -1, -100]
        const t = Tensor.from(Int32Array.from(targets), { device }).to(targetType)
        const loss = await ops.crossEntropy(x, t).floats()
        const values = await x.floats()
        targets.forEach((target, r) => {
          const part = values.subarray(r * n, (r + 1) * n)
          const [top, sum] = softmaxSum(part)
          const expected = target < 0 ? 0 : log(sum) + top - part[target]!
          expect(abs(loss[r]! - expected)).toBeLessThan(1e-6 * max(1, expected))
        })
      }
    })

    it('stays exact for logits far from zero, and gives NaN for a target outside', async () => {
      const x = Tensor.from(Float32Array.from([1e4, 1e4, 1e4, -1e4]), { shape: [2, 2], device })
      const loss = await ops.crossEntropy(x, Tensor.from(Int32Array.from([1, 2]), { device })).floats()
      expect(loss[0]).toBeCloseTo(log(2), 6)
      expect(loss[1]).toBeNaN()
      const last = await ops.crossEntropy(x, Tensor.from(Int32Array.from([1, 1]), { device })).floats()
      expect(last[1]).toBe(20000)
    })
  })

  describe('sample', () => {
    const filters: [string, SamplingParams][] = [
      ['nothing', {}],
      ['temperature', { temperature: 0.5 }],
      ['top-k 1', { topK: 1 }],
      ['top-k 5', { topK: 5 }],
      ['top-k beyond the vocabulary', { topK: 5000 }],
      ['top-p 0.3', { topP: 0.3 }],
      ['top-p 0.9', { topP: 0.9 }],
      ['top-p 0.001', { topP: 0.001 }],
      ['min-p 0.1', { minP: 0.1 }],
      ['min-p 1', { minP: 1 }],
      ['repetition penalty', { penalty: 1.7 }],
      ['a penalty that rewards', { penalty: 0.6 }],
      ['everything', { temperature: 1.3, topK: 20, topP: 0.8, minP: 0.05, penalty: 1.3 }],
    ]
    const n = 40
    const draws = 4000
    const seen = Uint8Array.from({ length: n }, (_, i) => (i % 3 === 0 ? 1 : 0))

    it.each(filters)('%s: the set and the frequencies are those of the definition', async (_, params) => {
      const logits = gaussian(n, 5)
      const chances = probabilities(logits, params, seen)
      const counts = new Float64Array(n)
      for (const token of await draw(device, logits, params, draws, { seen })) counts[token]!++
      let chi = 0
      let degrees = -1
      let [rareExpected, rareCount] = [0, 0]
      counts.forEach((count, i) => {
        const expected = chances[i]! * draws
        if (expected === 0) expect(count).toBe(0)
        if (expected < 8) {
          rareExpected += expected
          rareCount += count
        } else {
          chi += (count - expected) ** 2 / expected
          degrees++
        }
      })
      if (rareExpected > 8) {
        chi += (rareCount - rareExpected) ** 2 / rareExpected
        degrees++
      }
      // the 99.99 % quantile of chi-square by Wilson and Hilferty; the draws are fixed
      const d = max(1, degrees)
      expect(chi).toBeLessThan(d * (1 - 2 / (9 * d) + 3.72 * sqrt(2 / (9 * d))) ** 3)
    })

    it.each(filters)('%s: every draw is where its random number falls', async (_, params) => {
      const logits = gaussian(n, 6)
      const chances = probabilities(logits, params, seen)
      for (const seed of [0n, 77n, -1n, 1n << 40n]) {
        expectByDefinition(await draw(device, logits, params, 50, { seen, seed }), chances, seed, 1e-6)
      }
    })

    it('has the published values of Philox behind it', () => {
      // block of key 0, counter 0: 6627e8d5 e169c58d bc57ac4c 9b00dbd8
      expect(uniform(0n, 0n)).toBe((0x6627e8d5 * 2 ** 21 + (0xe169c58d >>> 11)) / 2 ** 53)
    })

    it.each([
      { topK: 50 },
      { topP: 0.9 },
      { topK: 1000, topP: 0.5 },
      { minP: 0.2, temperature: 0.7 },
    ] as SamplingParams[])('chooses among 128k tokens exactly as the definition: %j', async (params) => {
      const logits = gaussian(128256, 8)
      const chances = probabilities(logits, params)
      expectByDefinition(await draw(device, logits, params, 4, { seed: 3n }), chances, 3n, 1e-5)
    })

    // rows that begin anywhere, end anywhere, and are shared by different numbers of threads
    it.each(['float32', 'float16', 'bfloat16'] as DType[])(
      'takes rows of any length of %s',
      async (dtype) => {
        const odd = { temperature: 0.8, penalty: 1.2, minP: 0.01 }
        for (const n of [
          1, 2, 7, 8, 9, 31, 33, 255, 257, 767, 768, 769, 1535, 1537, 3071, 6143, 6145, 12289,
        ]) {
          const logits = await Tensor.from(gaussian(n, n), { device }).to(dtype).floats()
          const marked = Uint8Array.from({ length: n }, (_, i) => (i % 5 === 0 ? 1 : 0))
          for (const params of [
            {},
            { topK: 40 },
            { topP: 0.7 },
            { topK: 900, topP: 0.95 },
            odd,
            { temperature: 0 },
          ]) {
            const chances = probabilities(logits, { ...params, temperature: params.temperature || 1 }, marked)
            const tokens = await draw(device, logits, params, 3, { seed: BigInt(n), seen: marked, dtype })
            if (params.temperature === 0)
              expect([...tokens]).toEqual(new Array(3).fill(logits.indexOf(softmaxSum(logits)[0])))
            else expectByDefinition(tokens, chances, BigInt(n), 1e-5)
          }
        }
      },
    )

    it.each([1, 40, 100, 300])('takes %i rows of one batch', async (rows) => {
      const logits = gaussian(9001, rows, 3)
      for (const params of [{}, { topK: 50, topP: 0.9 }, { topP: 0.9 }, { topK: 2000 }]) {
        const tokens = await draw(device, logits, params, rows, { seed: 5n, dtype: 'bfloat16' })
        const rounded = await Tensor.from(logits, { device }).to('bfloat16').floats()
        expectByDefinition(tokens, probabilities(rounded, params), 5n, 1e-5)
      }
    })

    // few rows and many, which different numbers of threads share
    const shapes = ['flat', 'wide', 'peaked', 'masked', 'broken']
    const dtypes: DType[] = ['float32', 'float16', 'bfloat16']
    it.each(dtypes.flatMap((dtype) => shapes.map((shape): [DType, string] => [dtype, shape])))(
      'takes a large vocabulary of %s, %s',
      async (dtype, shape) => {
        const n = 20011
        const logits = gaussian(n, 21, shape === 'flat' || shape === 'peaked' ? 1 : 3)
        if (shape === 'peaked') for (let i = 5; i < n; i += 701) logits[i]! += 12
        if (shape === 'masked')
          for (let i = 0; i < n; i++) logits[i] = i % 90 === 7 ? logits[i]! + 100 : -Infinity
        if (shape === 'broken')
          for (let i = 0; i < n; i++) logits[i] = i % 333 === 1 ? NaN : logits[i]! - 2000
        const marked = Uint8Array.from({ length: n }, (_, i) => (i % 5 === 0 ? 1 : 0))
        const rounded = await Tensor.from(logits, { device }).to(dtype).floats()
        const clean = rounded.map((x) => (Number.isNaN(x) ? -Infinity : x))
        for (const [params, seen] of [
          [{ temperature: 0.7 }],
          [{ topP: 0.9 }],
          [{ topP: 0.95, temperature: 1.4, penalty: 1.2 }, marked],
          [{ topP: 0.6, minP: 0.01 }],
          [{ minP: 0.02 }],
          [{ topK: 40, topP: 0.8 }],
        ] as [SamplingParams, Uint8Array?][]) {
          const chances = probabilities(clean, params, seen)
          for (const draws of [2, 140]) {
            const tokens = await draw(device, logits, params, draws, { seed: 6n, seen, dtype })
            expectByDefinition(tokens, chances, 6n, 2e-5)
          }
        }
      },
    )

    // where the cut lies is estimated, and there is little room for what lies there: either may not be enough
    it.each(['float32', 'bfloat16'] as DType[])(
      'finds the nucleus of %s that is flat, of a heavy tail, uneven or in two parts',
      async (dtype) => {
        const n = 20021
        const uneven = gaussian(n, 31, 1.5)
        for (let i = 0; i < n / 8; i++) uneven[i]! += 4
        const twofold = gaussian(n, 32, 1)
        for (let i = 11; i < n; i += 499) twofold[i] = 7 + (i % 13) / 4
        for (const logits of [gaussian(n, 33, 1), gaussian(n, 34, 3), uneven, twofold]) {
          const rounded = await Tensor.from(logits, { device }).to(dtype).floats()
          for (const params of [{ topP: 0.9 }, { topP: 0.8, minP: 0.002, temperature: 1.2 }]) {
            const chances = probabilities(rounded, params)
            // more rows than an H100 has clusters for: each is one block's
            const tokens = await draw(device, logits, params, 270, { seed: 8n, dtype })
            expectByDefinition(tokens, chances, 8n, 2e-5)
          }
        }
      },
    )

    it('takes a row longer than any memory on the chip', async () => {
      const logits = gaussian(600001, 4)
      for (const params of [{}, { topK: 50 }, { topP: 0.8 }, { topK: 5000, minP: 0.3 }]) {
        const tokens = await draw(device, logits, params, 2, { seed: 9n })
        expectByDefinition(tokens, probabilities(logits, params), 9n, 1e-5)
      }
    })

    it('keeps any number of ties, and finds the few tokens that are not masked', async () => {
      const n = 20011
      const levels = Float32Array.from({ length: n }, (_, i) => ((i * 7919) % 7) - 3)
      const equal = new Float32Array(n).fill(-1.5)
      const rising = Float32Array.from({ length: n }, (_, i) => i / 1000)
      const masked = new Float32Array(n).fill(-Infinity)
      for (const i of [17, 9000, 20010]) masked[i] = i / 1e4
      for (const logits of [levels, equal, rising, rising.slice().reverse(), masked]) {
        for (const params of [{ topK: 50 }, { topK: 3000 }, { topP: 0.55 }, { topK: 15000, topP: 0.31 }]) {
          const tokens = await draw(device, logits, params, 5, { seed: 2n })
          expectByDefinition(tokens, probabilities(logits, params), 2n, 1e-5)
        }
      }
    })

    it.each(['float16', 'bfloat16'] as DType[])('reads %s', async (dtype) => {
      const logits = gaussian(n, 9)
      const rounded = await Tensor.from(logits, { device }).to(dtype).floats()
      const params = { topK: 10 }
      expect(await draw(device, logits, params, 40, { dtype })).toEqual(
        await draw(device, rounded, params, 40),
      )
    })

    it('keeps ties together', async () => {
      const logits = Float32Array.from([1, 3, 2, 3, 2, 2, 0])
      const kept = async (params: SamplingParams) =>
        [...new Set(await draw(device, logits, params, 300))].sort()
      expect(await kept({ topK: 2 })).toEqual([1, 3])
      expect(await kept({ topK: 3 })).toEqual([1, 2, 3, 4, 5])
      expect(await kept({ topP: 0.1 })).toEqual([1, 3])
    })

    it('is greedy at temperature 0 and at top-p 0', async () => {
      const logits = Float32Array.from([1, 3, 2, 3])
      for (const params of [{ temperature: 0 }, { temperature: -1 }, { temperature: NaN }, { topP: 0 }])
        expect([...(await draw(device, logits, params, 20))]).toEqual(new Array(20).fill(1))
      const seen = Uint8Array.from([0, 1, 0, 1])
      const options = { temperature: 0, penalty: 2 }
      expect([...(await draw(device, logits, options, 2, { seen }))]).toEqual([2, 2])
    })

    it.each(['float32', 'float16', 'bfloat16'] as DType[])('is greedy among NaN of %s', async (dtype) => {
      const logits = new Float32Array(64).fill(NaN)
      const options = { temperature: 0 }
      const best = async () => [...(await draw(device, logits, options, 2, { dtype }))]
      expect(await best()).toEqual([0, 0])
      logits.set([-3, 1, -2], 21)
      expect(await best()).toEqual([22, 22])
      logits[47] = Infinity
      expect(await best()).toEqual([47, 47])
    })

    it('advances the counter and marks what was chosen', async () => {
      const state: ops.SampleState = {
        params: Tensor.from(Float32Array.from([...row({ temperature: 0 }), ...row({})]), {
          shape: [2, 5],
          device,
        }),
        rng: Tensor.from(BigInt64Array.from([5n, 7n, -9n, 2n ** 63n - 1n]), { shape: [2, 2], device }),
        seen: Tensor.zeros([2, 3], 'uint8', device),
      }
      const tokens = await ops
        .sample(Tensor.from(Float32Array.from([0, 1, 2, 5, -99, -99]), { shape: [2, 3], device }), state)
        .data()
      expect([...tokens]).toEqual([2, 0])
      expect([...(await state.rng.data())]).toEqual([5n, 8n, -9n, -(2n ** 63n)])
      expect([...(await state.seen!.data())]).toEqual([0, 0, 1, 1, 0, 0])
    })

    it('always answers, whatever the logits and parameters hold', async () => {
      const inf = Infinity
      const rows = [
        [NaN, NaN, NaN],
        [-inf, -inf, -inf],
        [inf, inf, -inf],
        [NaN, 2, -inf],
        [3.4e38, -3.4e38, 0],
        [-3.4e38, -inf, -inf],
      ]
      const odd = [NaN, -inf, inf, -1, 0, 1e-45, 1e38]
      for (const logits of rows) {
        const allowed = logits.map((x) => x > -inf)
        if (!allowed.includes(true)) allowed[0] = true
        for (const field of ['temperature', 'topK', 'topP', 'minP', 'penalty'] as const) {
          for (const value of odd) {
            const seen = Uint8Array.from([1, 1, 0])
            for (const token of await draw(device, Float32Array.from(logits), { [field]: value }, 3, {
              seen,
            })) {
              expect([0, 1, 2]).toContain(token)
              expect(allowed[token]).toBe(true)
            }
          }
        }
      }
    })

    it('works without rows and with one token', async () => {
      expect((await draw(device, new Float32Array(4), {}, 0)).length).toBe(0)
      expect([...(await draw(device, Float32Array.from([-5]), { topK: 3, topP: 0.5 }, 2))]).toEqual([0, 0])
    })

    it('refuses operands that do not fit', () => {
      const logits = Tensor.zeros([2, 3], 'float32', device)
      const params = Tensor.zeros([2, 5], 'float32', device)
      const rng = Tensor.zeros([2, 2], 'int64', device)
      expect(() => ops.sample(logits, { params, rng: Tensor.zeros([1, 2], 'int64', device) })).toThrow(
        /\[2, 2\]/,
      )
      expect(() => ops.sample(logits, { params: Tensor.zeros([2, 4], 'float32', device), rng })).toThrow(
        /\[2, 5\]/,
      )
      const seen = Tensor.zeros([2, 3], 'int32', device)
      expect(() => ops.sample(logits, { params, rng, seen })).toThrow(/int32/)
      expect(() => ops.sample(Tensor.zeros([2, 0], 'float32', device), { params, rng })).toThrow(/\[2, 0\]/)
    })
  })
})
