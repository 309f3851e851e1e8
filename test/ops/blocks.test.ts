/** 4-bit and 8-bit blocks: every shape and dtype against a plain computation, errors as bitsandbytes' tests state them. */
import { devices, functional, HalfbyteError, ops, Tensor } from '../../lib/index.js'
import { native } from '../../lib/native.js'
import { FLOATS, randn, rounded, uniform } from '../support/reference.js'

// looking up globals is slow inside jest
const { abs, ceil, floor, fround, max, min } = Math

const NORMAL = randn(1024 * 1024, 1)
const BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
const TYPES = ['nf4', 'fp4'] as const

/** From bitsandbytes' own tests: mean |error| and mean relative error with their standard deviations. */
const ERRORS: Record<(typeof TYPES)[number], Record<number, [number, number, number, number]>> = {
  fp4: {
    32: [0.088925, 9.1e-5, 0.242443, 3.3e-4],
    64: [0.096543, 1.11e-4, 0.260125, 3.79e-4],
    128: [0.102969, 1.34e-4, 0.275817, 4.33e-4],
    256: [0.108684, 1.82e-4, 0.289831, 4.97e-4],
    512: [0.114115, 2.34e-4, 0.302881, 5.83e-4],
    1024: [0.119333, 3.2e-4, 0.315, 7.57e-4],
    2048: [0.124556, 4.55e-4, 0.326607, 9.55e-4],
    4096: [0.129536, 6.12e-4, 0.337169, 1.239e-3],
  },
  nf4: {
    32: [0.067746, 6.9e-5, 0.189726, 3.04e-4],
    64: [0.072798, 7.4e-5, 0.203339, 3.4e-4],
    128: [0.076831, 9.1e-5, 0.215237, 3.91e-4],
    256: [0.080337, 1.02e-4, 0.226105, 3.98e-4],
    512: [0.083547, 1.43e-4, 0.236079, 5.44e-4],
    1024: [0.08661, 1.87e-4, 0.24537, 6.0e-4],
    2048: [0.089592, 2.51e-4, 0.254163, 7.47e-4],
    4096: [0.092547, 3.6e-4, 0.262473, 9.99e-4],
  },
}

/** How far x is from the nearest entry of an ascending code. */
function nearest(code: ArrayLike<number>, x: number): number {
  let low = 0
  let high = code.length - 1
  while (high - low > 1) {
    const middle = (low + high) >> 1
    if (code[middle]! <= x) low = middle
    else high = middle
  }
  return min(abs(x - code[low]!), abs(x - code[high]!))
}

/** The largest magnitude of every block. */
function absmaxOf(values: Float32Array, blocksize: number): Float32Array {
  const most = new Float32Array(ceil(values.length / blocksize))
  for (let i = 0; i < values.length; i++) {
    const block = floor(i / blocksize)
    most[block] = max(most[block]!, abs(values[i]!))
  }
  return most
}

describe.each(devices())('blocks on %s', (device) => {
  const tensor = (data: Float32Array, shape: number[] = [data.length]) => Tensor.from(data, { shape, device })

  describe.each(TYPES)('%s', (quantType) => {
    const code = native.codebook(quantType)
    const ascending = Float32Array.from(code).sort()

    it.each(BLOCKSIZES)('has the expected error in blocks of %i', async (blocksize) => {
      const values = NORMAL
      const x = tensor(values, [1024, 1024])
      const { codes, state } = functional.quantize4bit(x, { quantType, blocksize })
      const y = await functional.dequantize4bit(codes, state).floats()
      let absolute = 0
      let relative = 0
      for (let i = 0; i < y.length; i++) {
        const error = abs(y[i]! - values[i]!)
        absolute += error
        relative += error / (abs(values[i]!) + 1e-8)
      }
      absolute /= y.length
      relative /= y.length
      const [mean, sigma, relativeMean, relativeSigma] = ERRORS[quantType][blocksize]!
      expect(absolute).toBeLessThan(mean + 7 * sigma)
      expect(absolute).toBeGreaterThan(mean - 7 * sigma)
      expect(relative).toBeLessThan(relativeMean + 7 * relativeSigma)
      for (const t of [x, codes, state]) t.dispose()
    })

    it.each([32, 64, 128])(
      'keeps the error small with double quantisation, blocks of %i',
      async (blocksize) => {
        const values = NORMAL
        const x = tensor(values, [1024, 1024])
        const { codes, state } = functional.quantize4bit(x, {
          quantType,
          blocksize,
          compressStatistics: true,
        })
        const y = await functional.dequantize4bit(codes, state).floats()
        const absolute = y.reduce((sum, v, i) => sum + abs(v - values[i]!), 0) / y.length
        expect(absolute).toBeLessThan(0.11)
        for (const t of [x, codes, state]) t.dispose()
      },
    )

    // the last: blocks of several warps, and one that is cut short
    it.each([0, 1, 2, 31, 32, 33, 63, 65, 127, 1000, 4097, 9001])('packs %i elements', async (n) => {
      const all = randn(n, n + 1)
      for (const dtype of FLOATS) {
        const x = tensor(all).to(dtype)
        const values = await x.floats()
        for (const blocksize of n > 4096 ? [64, 256, 512, 1024, 2048, 4096] : [32, 256]) {
          const { codes, absmax } = ops.quantizeBlocks4(x, quantType, blocksize)
          expect(codes.shape).toEqual([ceil(n / 2), 1])
          const bytes = (await codes.data()) as Uint8Array
          const scales = (await absmax.data()) as Float32Array
          expect(scales).toEqual(absmaxOf(values, blocksize))
          if (n % 2 === 1) expect(bytes[n >> 1]! & 15).toBe(quantType === 'nf4' ? 7 : 0)
          const chosen = new Float32Array(n)
          let far = 0
          for (let i = 0; i < n; i++) {
            chosen[i] = code[i % 2 === 0 ? bytes[i >> 1]! >> 4 : bytes[i >> 1]! & 15]!
            const scaled = values[i]! / scales[floor(i / blocksize)]!
            far = max(far, abs(chosen[i]! - scaled) - nearest(ascending, scaled))
          }
          expect(far).toBeLessThan(1e-5)
          const packed = { codes, absmax, quantType, blocksize, n: 1, k: n }
          for (const to of FLOATS) {
            const y = await ops.dequantizeBlocks4(packed, to).floats()
            let wrong = 0
            for (let i = 0; i < n; i++) {
              const exact = fround(chosen[i]! * scales[floor(i / blocksize)]!)
              if (y[i] !== rounded(exact, to)) wrong++
            }
            expect(wrong).toBe(0)
          }
        }
      }
    })

    it('turns blocks of zeros and of tiny numbers into zeros', async () => {
      const x = new Float32Array(128)
      x.fill(1e-40, 64)
      const { codes, state } = functional.quantize4bit(tensor(x), { quantType })
      const y = await functional.dequantize4bit(codes, state).floats()
      expect(y.every((v) => v === 0)).toBe(true)
    })

    it('leaves NaN out of the absmax', async () => {
      const x = Float32Array.from({ length: 64 }, (_, i) => (i === 5 ? NaN : i / 63))
      const { state } = functional.quantize4bit(tensor(x), { quantType })
      expect(await state.absmax.item()).toBe(1)
    })

    it.each([false, true])('gathers rows, nested: %s', async (compressStatistics) => {
      for (const [v, d] of [
        [5, 64],
        [50, 200],
        [9, 33],
        [3, 1],
        [4, 200],
      ] as const) {
        const { codes, state } = functional.quantize4bit(tensor(randn(v * d, d), [v, d]), {
          quantType,
          blocksize: 32,
          compressStatistics,
        })
        const all = await functional.dequantize4bit(codes, state).floats()
        const ids = [v - 1, 0, 1, 1]
        for (const dtype of FLOATS) {
          const y = ops.gatherRows4(state.packed(codes), Tensor.from(ids, { dtype: 'int64', device }), dtype)
          expect(y.shape).toEqual([4, d])
          const expected = ids.flatMap((id) =>
            Array.from(all.subarray(id * d, id * d + d), (x) => rounded(x, dtype)),
          )
          expect(Array.from(await y.floats())).toEqual(expected)
        }
        const outside = ops.gatherRows4(
          state.packed(codes),
          Tensor.from([v], { dtype: 'int32', device }),
          'float32',
        )
        expect((await outside.floats()).every(Number.isNaN)).toBe(true)
      }
    })
  })

  it.each(FLOATS)('takes elements at any address in %s', async (dtype) => {
    const all = tensor(randn(9001, 5)).to(dtype)
    const code = tensor(native.codebook('dynamic'))
    for (const begin of [1, 2, 3, 4, 8]) {
      const part = all.slice(0, begin, begin + 8192 + begin)
      const copy = part.clone()
      for (const blocksize of [64, 4096]) {
        for (const quantise of [
          (x: Tensor) => ops.quantizeBlocks4(x, 'nf4', blocksize),
          (x: Tensor) => ops.quantizeBlocks8(x, code, blocksize),
        ]) {
          const [a, b] = [quantise(part), quantise(copy)]
          expect(await a.codes.data()).toEqual(await b.codes.data())
          expect(await a.absmax.data()).toEqual(await b.absmax.data())
        }
      }
    }
  })

  it('reads a strided input in its own order', async () => {
    const x = tensor(randn(64 * 48, 1), [64, 48])
    const turned = x.transpose(0, 1)
    const a = ops.quantizeBlocks4(turned, 'nf4', 64)
    const b = ops.quantizeBlocks4(turned.clone(), 'nf4', 64)
    expect(await a.codes.data()).toEqual(await b.codes.data())
  })

  describe('8-bit', () => {
    const maps = {
      dynamic: native.codebook('dynamic'),
      dynamic_unsigned: native.codebook('dynamic_unsigned'),
      linear: Float32Array.from({ length: 256 }, (_, i) => (i - 127.5) / 127.5),
      // most entries lie within a thousandth
      dense: Float32Array.from({ length: 256 }, (_, i) => (i === 0 ? -1 : i === 255 ? 1 : (i - 100) / 256e3)),
    }
    it.each([
      ['dynamic', 1],
      ['dynamic', 7],
      ['dynamic', 256],
      ['dynamic', 100000],
      ['dynamic_unsigned', 64],
      ['dynamic_unsigned', 4096],
      ['linear', 32],
      ['linear', 1024],
      ['dense', 512],
      ['dense', 2048],
    ] as const)('%s in blocks of %i', async (map, blocksize) => {
      const code = maps[map]
      // the last: enough for a look-up table to pay, which only takes blocks of 32 to 4096
      for (const n of [0, 1, 13, 256, 601, ...(blocksize >= 32 && blocksize <= 4096 ? [70001] : [])]) {
        for (const dtype of FLOATS) {
          const x = tensor(randn(n, n).map((v) => (map === 'dynamic_unsigned' ? abs(v) : v))).to(dtype)
          const { codes, state } = functional.quantizeBlockwise(x, { code: tensor(code), blocksize })
          const q = (await codes.data()) as Uint8Array
          const scales = (await state.absmax.data()) as Float32Array
          const values = await x.floats()
          expect(scales).toEqual(absmaxOf(values, blocksize))
          let far = 0
          for (let i = 0; i < n; i++) {
            const scaled = values[i]! / scales[floor(i / blocksize)]!
            far = max(far, abs(code[q[i]!]! - scaled) - nearest(code, scaled))
          }
          expect(far).toBeLessThan(1.5e-7)
          const y = await functional.dequantizeBlockwise(codes, state).floats()
          let wrong = 0
          for (let i = 0; i < n; i++) {
            const exact = fround(code[q[i]!]! * scales[floor(i / blocksize)]!)
            if (y[i] !== rounded(exact, dtype)) wrong++
          }
          expect(wrong).toBe(0)
        }
      }
    })

    it('gives NaN code 0 and leaves it out of the absmax, in a large tensor too', async () => {
      const values = randn(70000, 3)
      for (let i = 0; i < values.length; i += 701) values[i] = NaN
      const { codes, state } = functional.quantizeBlockwise(tensor(values), {
        code: tensor(maps.dynamic),
        blocksize: 256,
      })
      const q = await codes.data()
      for (let i = 0; i < values.length; i += 701) expect(Number(q[i])).toBe(0)
      expect((await state.absmax.floats()).every((a) => a > 1 && a < 6)).toBe(true)
    })

    it('has the error that bitsandbytes states', async () => {
      const next = uniform(4)
      const even = new Float32Array(1024 * 1024).map(next)
      const error = async (values: Float32Array, map: 'dynamic' | 'dynamic_unsigned') => {
        const { codes, state } = functional.quantizeBlockwise(tensor(values), {
          code: tensor(native.codebook(map)),
        })
        const y = await functional.dequantizeBlockwise(codes, state).floats()
        return y.reduce((sum, v, i) => sum + abs(v - values[i]!), 0) / y.length
      }
      expect(await error(NORMAL, 'dynamic')).toBeLessThan(0.011)
      expect(await error(even, 'dynamic')).toBeLessThan(0.0036)
      expect(await error(even, 'dynamic_unsigned')).toBeLessThan(0.0023)
    })

    it('gathers int8 rows', async () => {
      const q = Int8Array.from({ length: 6 * 37 }, (_, i) => ((i * 37) % 255) - 127)
      const scb = randn(6, 2).map(abs)
      const table = Tensor.from(q, { shape: [6, 37], device })
      for (const dtype of FLOATS) {
        const y = ops.gatherRows8(
          table,
          tensor(scb),
          Tensor.from([5, 0, 6], { dtype: 'int32', device }),
          dtype,
        )
        const expected = [5, 0].flatMap((r) =>
          Array.from(
            q.subarray(37 * r, 37 * r + 37),
            (v) => rounded(fround(fround(v * scb[r]!) * fround(7.874015718698502e-3)), dtype) + 0,
          ),
        )
        const values = Array.from(await y.floats(), (v) => v + 0)
        expect(values.slice(0, 74)).toEqual(expected)
        expect(values.slice(74).every(Number.isNaN)).toBe(true)
      }
    })
  })

  it('refuses what does not fit', () => {
    const x = tensor(randn(64, 1))
    expect(() => ops.quantizeBlocks4(x, 'nf4', 48)).toThrow(/blocksize 48/)
    expect(() => ops.quantizeBlocks4(x, 'int4' as 'nf4', 64)).toThrow(/int4/)
    expect(() => ops.quantizeBlocks4(x.to('int32'), 'nf4', 64)).toThrow(HalfbyteError)
    const { codes, absmax } = ops.quantizeBlocks4(x, 'nf4', 64)
    const packed = { codes, absmax, quantType: 'nf4' as const, blocksize: 64, n: 1, k: 64 }
    expect(() => ops.dequantizeBlocks4({ ...packed, k: 66 }, 'float32')).toThrow(/33 bytes/)
    expect(() => ops.dequantizeBlocks4({ ...packed, blocksize: 32 }, 'float32')).toThrow(/absmax/)
    expect(() => ops.dequantizeBlocks4(packed, 'int8')).toThrow(HalfbyteError)
    expect(() => functional.quantizeBlockwise(x, { blocksize: 0 })).toThrow(HalfbyteError)
    expect(() => functional.quantizeBlockwise(x, { code: x })).toThrow(HalfbyteError)
  })
})
