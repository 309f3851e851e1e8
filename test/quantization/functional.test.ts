/** functional: LLM.int8() on tensors against bitsandbytes' results, nested statistics, codes held as other dtypes. */
import { devices, functional, Tensor, type DType } from '../../lib/index.js'
import { thrown } from '../support/errors.js'
import { readGolden, type Int8Case } from '../support/golden.js'
import { allocatedMemory, baselineMemory } from '../support/memory.js'
import { product } from '../support/product.js'
import { FLOATS, halfValues, int8Codes, randn, relativeError, rounded } from '../support/reference.js'

const int8 = readGolden<Int8Case>('int8')
const {
  createDynamicMap,
  dequantize4bit,
  dequantizeBlockwise,
  get4bitType,
  int8LinearMatmul,
  int8MmDequant,
  int8VectorwiseDequant,
  int8VectorwiseQuant,
  matmul,
  matmul4bit,
  quantize4bit,
  quantizeBlockwise,
} = functional

describe.each(devices())('functional on %s', (device) => {
  const from = (values: Float32Array, ...shape: number[]) => Tensor.from(values, { shape, device })

  describe('LLM.int8()', () => {
    it.each(int8.cases)('case $case: [$M, $K] x [$N, $K], threshold $threshold', async (c) => {
      const name = (part: string) => `c${c.case}.${part}`
      const of = (part: string) => int8.tensor(name(part), device.name)
      const x = int8VectorwiseQuant(of('x'), c.threshold)
      const w = int8VectorwiseQuant(of('w'))
      expect(await x.codes.data()).toEqual(int8.data(name('x_q')))
      expect(await x.rowAbsmax.data()).toEqual(int8.data(name('x_stats')))
      expect(x.outlierMask !== undefined).toBe(c.threshold > 0)
      expect(w.outlierMask).toBeUndefined()
      const acc = int8LinearMatmul(x.codes, w.codes)
      expect(await acc.data()).toEqual(int8.data(name('acc')))
      const scaled = int8MmDequant(acc, x.rowAbsmax, w.rowAbsmax)
      expect(scaled.dtype).toBe('float16')
      expect(await scaled.data()).toEqual(int8.data(name('mm_dequant')))

      // a packed weight and a float one that is quantised on the way give the same
      const options = { threshold: c.threshold, bias: c.bias ? of('bias') : undefined, bnbExact: true }
      const packed = await matmul(of('x'), { CB: w.codes, SCB: w.rowAbsmax }, options).data()
      expect(await matmul(of('x'), of('w'), options).data()).toEqual(packed)
      const golden = halfValues(int8.data(name('y')) as Uint16Array)
      expect(relativeError(halfValues(packed as Uint16Array), golden)).toBeLessThan(c.outliers ? 3e-4 : 1e-9)
    })

    it.each(FLOATS)('matmul() is the product with the dequantised weight, from %s', async (dtype) => {
      const [m, n, k] = [5, 21, 70]
      const values = randn(m * k, 1).map((v) => rounded(Math.max(-3, Math.min(3, v)), dtype))
      values[3] = rounded(20.5, dtype)
      const codes = int8Codes(n * k, 2)
      const scb = randn(n, 3).map(Math.abs)
      const bias = randn(n, 4)
      const CB = Tensor.from(codes, { shape: [n, k], device })
      const SCB = from(scb, n)
      const weight = (await int8VectorwiseDequant(CB, SCB).data()) as Float32Array
      weight.forEach((v, i) => expect(v).toBeCloseTo((codes[i]! * scb[Math.floor(i / k)]!) / 127, 5))
      const want = product(values, weight, k, bias)
      for (const leading of [[m], [1, m], [m, 1]]) {
        const x = from(values, ...leading, k).to(dtype)
        const y = matmul(x, { CB, SCB }, { bias: from(bias, n), threshold: 6 })
        expect(y.shape).toEqual([...leading, n])
        expect(y.dtype).toBe(dtype)
        // the rows' own quantisation: half a step of 127
        expect(relativeError(await y.floats(), want)).toBeLessThan(1e-2)
      }
      // without a threshold the one large value makes the steps of its row coarse
      const plain = await matmul(from(values, m, k).to(dtype), { CB, SCB }, { bias: from(bias, n) }).floats()
      const row = (y: ArrayLike<number>, i: number) => Array.from(y).slice(i * n, (i + 1) * n)
      const error = (i: number) => relativeError(row(plain, i), row(want, i))
      expect(error(0)).toBeGreaterThan(2 * Math.max(error(1), error(2), error(3), error(4)))
    })

    it('rows, and products of them, of any number of dimensions', async () => {
      const [a, b] = [int8Codes(2 * 3 * 19, 5), int8Codes(4 * 19, 6)]
      const left = Tensor.from(a, { shape: [2, 3, 19], device })
      const right = Tensor.from(b, { shape: [4, 19], device })
      const acc = int8LinearMatmul(left, right)
      expect([acc.dtype, acc.shape]).toEqual(['int32', [2, 3, 4]])
      expect(await acc.data()).toEqual(Int32Array.from(product(a, b, 19)))
      const vector = int8LinearMatmul(Tensor.from(a.slice(0, 19), { device }), right)
      expect(vector.shape).toEqual([4])
      const none = int8LinearMatmul(Tensor.zeros([2, 0, 19], 'int8', device), right)
      expect(none.shape).toEqual([2, 0, 4])

      const x = from(randn(2 * 3 * 19, 7), 2, 3, 19)
      const { codes, rowAbsmax } = int8VectorwiseQuant(x)
      expect([codes.shape, rowAbsmax.size]).toEqual([[2, 3, 19], 6])
      const back = int8VectorwiseDequant(codes, rowAbsmax)
      expect(back.shape).toEqual([2, 3, 19])
      expect(relativeError(await back.floats(), await x.floats())).toBeLessThan(1e-2)
    })

    it.each(FLOATS)('int8MmDequant() scales to %s, with a bias', async (dtype) => {
      const sums = Int32Array.of(16129, -16129, 32258, 0, 1, 1 << 24)
      const acc = Tensor.from(sums, { shape: [2, 3], device })
      const [rows, cols, bias] = [
        [1, 0.25],
        [1, 0.5, 4],
        [1, -2, 3],
      ]
      const tensor = (values: number[]) => from(Float32Array.from(values), values.length)
      const y = int8MmDequant(acc, tensor(rows), tensor(cols), { bias: tensor(bias), dtype })
      expect(y.dtype).toBe(dtype)
      const want = Array.from(
        sums,
        (sum, i) => (sum * rows[Math.floor(i / 3)]! * cols[i % 3]!) / 16129 + bias[i % 3]!,
      )
      const limit: Partial<Record<DType, number>> = { float32: 1e-6, float16: 1e-3, bfloat16: 8e-3 }
      expect(relativeError(await y.floats(), want)).toBeLessThan(limit[dtype]!)
    })

    it('refuses what does not fit', () => {
      const x = Tensor.zeros([2, 8], 'float32', device)
      const CB = Tensor.zeros([4, 8], 'int8', device)
      const SCB = Tensor.zeros([4], 'float32', device)
      const code = (fn: () => unknown) => thrown(fn).code
      expect(code(() => matmul(Tensor.zeros([2, 7], 'float32', device), { CB, SCB }))).toMatch(/SHAPE/)
      expect(code(() => matmul(x, Tensor.zeros([4, 9], 'float32', device)))).toMatch(/SHAPE/)
      expect(code(() => matmul(x, { CB: x, SCB }))).toMatch(/DTYPE/)
      expect(code(() => matmul(x, { CB, SCB: CB }))).toMatch(/DTYPE|SHAPE/)
      expect(code(() => matmul(x, { CB, SCB }, { threshold: NaN }))).toMatch(/VALUE/)
      expect(code(() => matmul(x, { CB, SCB }, { bias: Tensor.zeros([5], 'float32', device) }))).toMatch(
        /SHAPE/,
      )
      expect(code(() => int8VectorwiseQuant(CB))).toMatch(/DTYPE/)
      expect(code(() => int8VectorwiseQuant(x, -1))).toMatch(/VALUE/)
      expect(code(() => int8LinearMatmul(CB, x))).toMatch(/DTYPE/)
      expect(code(() => int8LinearMatmul(CB, Tensor.zeros([4, 9], 'int8', device)))).toMatch(/SHAPE/)
      expect(code(() => int8MmDequant(x, SCB, SCB))).toMatch(/DTYPE|SHAPE/)
    })
  })

  describe('codes held as other dtypes', () => {
    const storages = ['uint8', 'int8', 'float16', 'bfloat16', 'float32'] as const
    it.each(storages)('%s: the same bytes, values and products', async (quantStorage) => {
      const w = from(randn(12 * 96, 1), 12, 96)
      const x = from(randn(3 * 96, 2), 3, 96)
      for (const compressStatistics of [false, true]) {
        const common = { quantType: 'nf4', compressStatistics } as const
        const plain = quantize4bit(w, common)
        const { codes, state } = quantize4bit(w, { ...common, quantStorage })
        const bytesEach = { uint8: 1, int8: 1, float16: 2, bfloat16: 2, float32: 4 }[quantStorage]
        expect([codes.dtype, codes.shape]).toEqual([quantStorage, [(12 * 96) / 2 / bytesEach, 1]])
        expect(await codes.bitcast('uint8').reshape(-1, 1).data()).toEqual(await plain.codes.data())
        expect(await dequantize4bit(codes, state).data()).toEqual(
          await dequantize4bit(plain.codes, plain.state).data(),
        )
        expect(await matmul4bit(x, codes, state).data()).toEqual(
          await matmul4bit(x, plain.codes, plain.state).data(),
        )
      }
    })

    it('of a number of bytes that does not divide, or of a dtype that none are held as, are refused', () => {
      const odd = from(randn(6, 1), 6)
      expect(thrown(() => quantize4bit(odd, { quantStorage: 'float16' })).code).toMatch(/DTYPE|SHAPE/)
      expect(quantize4bit(odd).codes.shape).toEqual([3, 1])
      expect(thrown(() => quantize4bit(odd, { quantStorage: 'int32' as 'int8' })).message).toMatch(
        /quantStorage/,
      )
      const { codes, state } = quantize4bit(from(randn(64, 1), 64))
      expect(thrown(() => dequantize4bit(codes.to('float32'), state)).code).toMatch(/SHAPE/)
    })
  })

  describe('nested statistics of 8-bit blocks', () => {
    it.each([
      [64, 1000],
      [256, 70_000],
      [4096, 10_000],
      [64, 0],
    ])('blocks of %i, %i values', async (blocksize, n) => {
      const values = randn(n, 3)
      const x = from(values, n)
      const plain = quantizeBlockwise(x, { blocksize })
      const { codes, state } = quantizeBlockwise(x, { blocksize, nested: true })
      expect(state.nested).toBe(true)
      expect(plain.state.nested).toBe(false)
      expect(await codes.data()).toEqual(await plain.codes.data())
      const blocks = Math.ceil(n / blocksize)
      expect([state.absmax.dtype, state.absmax.size]).toEqual(['uint8', blocks])
      expect(state.state2!.blocksize).toBe(blocksize)
      expect(state.state2!.absmax.size).toBe(Math.ceil(blocks / blocksize))

      // the codes' own values, times statistics from the map: the nearest entry to each centred absmax
      const absmax = (await plain.state.absmax.data()) as Float32Array
      const map = (await createDynamicMap(true, device).data()) as Float32Array
      const mean = absmax.reduce((a, b) => a + b, 0) / Math.max(blocks, 1)
      const centred = absmax.map((v) => v - mean)
      const found = (await dequantizeBlockwise(codes, state).data()) as Float32Array
      const own = (await plain.codes.data()) as Uint8Array
      const statistics = centred.map((v, block) => {
        const group = Math.floor(block / blocksize) * blocksize
        const scale = Math.max(...centred.subarray(group, group + blocksize).map(Math.abs))
        const nearest = map.reduce((best, entry) =>
          Math.abs(entry - v / scale) < Math.abs(best - v / scale) ? entry : best,
        )
        return nearest * scale + mean
      })
      const worst = found.reduce((most, value, i) => {
        const want = map[own[i]!]! * statistics[Math.floor(i / blocksize)]!
        return Math.max(most, Math.abs(value - want))
      }, 0)
      expect(worst).toBeLessThan(1e-4)
      state.dispose()
      plain.state.dispose()
      expect(() => dequantizeBlockwise(codes, state)).toThrow(/disposed/)
    })
  })

  it('the maps are those of the formats', async () => {
    for (const type of ['nf4', 'fp4'] as const) {
      const table = (await get4bitType(type, device).data()) as Float32Array
      expect([table.length, Math.max(...table)]).toEqual([16, 1])
    }
    const signed = (await createDynamicMap(true, device).data()) as Float32Array
    const unsigned = (await createDynamicMap(false, device).data()) as Float32Array
    expect([signed[0], signed[127], signed[255]]).toEqual([Math.fround(-0.992968738079071), 0, 1])
    expect([unsigned[0], unsigned[254], unsigned[255]]).toEqual([0, Math.fround(0.9964843988418579), 1])
  })

  it('leaves nothing behind', async () => {
    const turn = () => {
      using x = from(randn(4 * 64, 1), 4, 64)
      using w = from(randn(8 * 64, 2), 8, 64)
      for (const quantStorage of ['uint8', 'float32'] as const) {
        for (const compressStatistics of [false, true]) {
          const { codes, state } = quantize4bit(w, { quantStorage, compressStatistics })
          dequantize4bit(codes, state).dispose()
          matmul4bit(x, codes, state).dispose()
          codes.dispose()
          state.dispose()
        }
      }
      for (const nested of [false, true]) {
        const { codes, state } = quantizeBlockwise(w, { nested, blocksize: 64 })
        dequantizeBlockwise(codes, state).dispose()
        codes.dispose()
        state.dispose()
      }
      matmul(x, w, { threshold: 2 }).dispose()
      const { codes, rowAbsmax, outlierMask } = int8VectorwiseQuant(x, 2)
      int8LinearMatmul(codes, codes).dispose()
      for (const tensor of [codes, rowAbsmax, outlierMask!]) tensor.dispose()
    }
    turn()
    const before = await baselineMemory(device)
    for (let i = 0; i < 20; i++) turn()
    expect(await allocatedMemory(device)).toBeLessThanOrEqual(before)
  })
})
