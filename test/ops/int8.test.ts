/** LLM.int8() ops against plain computations in doubles, over shapes, dtypes, outliers and odd values. */
import { devices, ops, Tensor, type DType } from '../../lib/index.js'
import { product } from '../support/product.js'
import {
  FLOATS,
  fromBfloat16,
  int8Codes,
  randn,
  relativeError,
  rounded,
  toBfloat16,
  toFloat16,
  uniform,
} from '../support/reference.js'

const { abs, floor, max, min } = Math // looking up globals is slow inside jest

const LIMIT: Partial<Record<DType, number>> = { float32: 1e-5, float16: 2e-3, bfloat16: 1e-2 }

function tensorOf(values: Float32Array, shape: number[], dtype: DType, device: string): Tensor {
  if (dtype === 'float32') return Tensor.from(values, { shape, device })
  const bits = Uint16Array.from(values, dtype === 'float16' ? toFloat16 : toBfloat16)
  return Tensor.from(bits, { shape, dtype, device })
}

const SHAPES: [number, number, number][] = [
  [0, 5, 16],
  [1, 1, 1],
  [1, 7, 3],
  [1, 33, 64],
  [2, 5, 130],
  [3, 17, 31],
  [4, 16, 72],
  [5, 19, 65],
  [7, 18, 1030],
  [64, 33, 100],
  [67, 3, 257],
  // for tensor cores: K a multiple of 16; 272 outlier columns are more than there is room for beside others
  [20, 136, 1040],
  [33, 41, 144],
  [70, 72, 272],
  [150, 264, 80],
  [260, 24, 272],
  // K % 16 = 0: one launch for up to 16 rows, whose blocks share long K among them
  [1, 35, 1040],
  [2, 16, 16],
  [8, 51, 2064],
  [9, 20, 528],
  [13, 1, 3088],
  [16, 19, 4176],
  // more rows than a GPU has multiprocessors, several pieces of a row a thread
  [270, 2, 264],
]

/** Which columns hold an element of at least `threshold`. */
function outliersOf(x: ArrayLike<number>, k: number, threshold: number): boolean[] {
  const found = new Array<boolean>(k).fill(false)
  if (threshold > 0) for (let i = 0; i < x.length; i++) if (abs(x[i]!) >= threshold) found[i % k] = true
  return found
}

/** Rows of the layer's result from the codes and scales of x, in doubles. */
function layerRows(
  rows: number[],
  x: { values: Float32Array; codes: Int8Array; absmax: Float32Array; outliers: boolean[] },
  weight: { codes: Int8Array; scb: Float32Array },
): Float64Array {
  const k = x.outliers.length
  const n = weight.scb.length
  const pick = (of: (i: number) => number): Float64Array =>
    Float64Array.from({ length: rows.length * k }, (_, i) => of(rows[floor(i / k)]! * k + (i % k)))
  const regular = product(
    pick((i) => x.codes[i]!),
    weight.codes,
    k,
  )
  const outlying = product(
    pick((i) => (x.outliers[i % k] ? x.values[i]! : 0)),
    weight.codes,
    k,
  )
  return regular.map((sum, i) => {
    const scale = weight.scb[i % n]! / 127
    return sum * (x.absmax[rows[floor(i / n)]!]! / 127) * scale + outlying[i]! * scale
  })
}

describe.each(devices())('int8 on %s', (device) => {
  const on = device.name

  it.each(SHAPES)('the product of [%i, K] and [%i, K], K = %i, is exact for every byte', async (m, n, k) => {
    const a = int8Codes(m * k, 1)
    const b = int8Codes(n * k, 2).fill(-128, 0, k)
    if (m > 1) a.fill(-128, k, 2 * k)
    const acc = ops.int8Matmul(
      Tensor.from(a, { shape: [m, k], device: on }),
      Tensor.from(b, { shape: [n, k], device: on }),
    )
    expect(await acc.data()).toEqual(Int32Array.from(product(a, b, k)))
  })

  describe.each(FLOATS)('%s', (dtype) => {
    it('rows come back to half a step', async () => {
      const [rows, k] = [5, 203]
      const values = randn(rows * k, 3).map((v) => rounded(v, dtype))
      const { codes, rowAbsmax } = ops.int8QuantizeRows(tensorOf(values, [rows, k], dtype, on))
      const absmax = (await rowAbsmax.data()) as Float32Array
      const back = await ops.int8DequantizeRows(codes, rowAbsmax, 'float32').floats()
      for (let r = 0; r < rows; r++) {
        const row = values.subarray(r * k, (r + 1) * k)
        expect(absmax[r]).toBe(max(...row.map(abs)))
        const worst = row.reduce((most, v, i) => max(most, abs(back[r * k + i]! - v)), 0)
        expect(worst).toBeLessThanOrEqual((absmax[r]! / 254) * 1.0001)
      }
      const narrow = await ops.int8DequantizeRows(codes, rowAbsmax, dtype).floats()
      expect(Array.from(narrow)).toEqual(Array.from(back, (v) => rounded(v, dtype)))
    })

    it.each(SHAPES)('layer [%i, K] x [%i, K], K = %i: no, some and only outlier columns', async (m, n, k) => {
      const codes = int8Codes(n * k, 4)
      const scb = randn(n, 5).map(abs)
      const bias = randn(n, 6)
      const residual = randn(m * n, 7).map((v) => rounded(v, dtype))
      const weight = Tensor.from(codes, { shape: [n, k], device: on })
      const stats = Tensor.from(scb, { device: on })
      for (const [threshold, share] of [
        [0, 0],
        [6, 0],
        [6, 0.1],
        [6, 1],
      ] as const) {
        const x = randn(m * k, 8).map((v) => max(-5, min(5, v)))
        const next = uniform(9)
        if (m > 0) for (let c = 0; c < k; c++) if (next() < share) x[floor(next() * m) * k + c] = -11.25
        const held = x.map((v) => rounded(v, dtype))
        const input = tensorOf(held, [m, k], dtype, on)

        const q = ops.int8QuantizeRows(input, threshold)
        const quantised = (await q.codes.data()) as Int8Array
        const absmax = (await q.rowAbsmax.data()) as Float32Array
        const isOutlier = outliersOf(held, k, threshold)
        if (q.outlierMask)
          expect(Array.from((await q.outlierMask.data()) as Uint8Array, Boolean)).toEqual(isOutlier)
        // in steps: 0 in outlier columns, else at most half a step from the value
        const off = quantised.map((code, i) => {
          const wanted = isOutlier[i % k] ? 0 : (held[i]! * 127) / absmax[floor(i / k)]!
          return abs(code - wanted) < (isOutlier[i % k] ? 1e-9 : 0.50001) ? 0 : 1
        })
        expect(off).toEqual(new Int8Array(m * k))

        const want = layerRows(
          Array.from({ length: m }, (_, r) => r),
          { values: held, codes: quantised, absmax, outliers: isOutlier },
          { codes, scb },
        ).map((v, i) => v + bias[i % n]! + residual[i]!)
        const y = ops.linear8bit(input, weight, stats, {
          bias: Tensor.from(bias, { device: on }),
          residual: tensorOf(residual, [m, n], dtype, on),
          threshold,
        })
        expect(y.dtype).toBe(dtype)
        expect(relativeError(await y.floats(), want)).toBeLessThan(LIMIT[dtype]!)
      }
    })
  })

  // many items a block, and one whose K is divided among blocks
  it.each([
    ['float16', 2304, 4096, 128],
    ['bfloat16', 2304, 4096, 128],
    ['float16', 200, 300, 4112],
    ['bfloat16', 200, 300, 4112],
  ] as const)(
    'layers of many rows, %s [%i, K] x [%i, K], K = %i: a few outliers and more',
    async (dtype, m, n, k) => {
      const codes = int8Codes(n * k, 1)
      const scb = randn(n, 2).map(abs)
      const weight = Tensor.from(codes, { shape: [n, k], device: on })
      const rows = [0, 1, 63, 128, 150, m - 1].concat(m > 256 ? [255, 256, 1031] : [])
      for (const columns of [6, 100]) {
        const values = randn(m * k, 3).map((v) => rounded(max(-5, min(5, v)), dtype))
        for (let c = 0; c < columns; c++) values[((c * 97) % m) * k + ((c * 41) % k)] = 9.5
        const x = tensorOf(values, [m, k], dtype, on)
        const q = ops.int8QuantizeRows(x, 6)
        const want = layerRows(
          rows,
          {
            values,
            codes: (await q.codes.data()) as Int8Array,
            absmax: (await q.rowAbsmax.data()) as Float32Array,
            outliers: outliersOf(values, k, 6),
          },
          { codes, scb },
        )
        const y = await ops.linear8bit(x, weight, Tensor.from(scb, { device: on }), { threshold: 6 }).floats()
        const got = rows.flatMap((r) => Array.from(y.subarray(r * n, (r + 1) * n)))
        expect(relativeError(Float32Array.from(got), want)).toBeLessThan(LIMIT[dtype]!)
      }
    },
  )

  it('a weight that does not lie on 16 bytes', async () => {
    const [m, n, k] = [40, 24, 64]
    const codes = int8Codes(n * k + 4, 1)
    const flat = Tensor.from(codes, { device: on })
    const apart = Tensor.from(codes.subarray(4), { shape: [n, k], device: on })
    const x = Tensor.from(randn(m * k, 2), { shape: [m, k], device: on })
    const scb = Tensor.full([n], 1, 'float32', on)
    const y = ops.linear8bit(x, flat.slice(0, 4, n * k + 4).reshape(n, k), scb)
    expect(relativeError(await y.floats(), await ops.linear8bit(x, apart, scb).floats())).toBeLessThan(1e-6)
  })

  it('x with outlier columns that begins between two words', async () => {
    const [m, n, k] = [40, 24, 64]
    const values = randn(m * k + 1, 1)
    for (const at of [3, 8, 70, 130, 1000]) values[1 + at] = 9.5
    const flat = tensorOf(values, [m * k + 1], 'float16', on)
    const apart = tensorOf(values.subarray(1), [m, k], 'float16', on)
    const weight = Tensor.from(int8Codes(n * k, 2), { shape: [n, k], device: on })
    const scb = Tensor.full([n], 1, 'float32', on)
    const y = ops.linear8bit(flat.slice(0, 1, m * k + 1).reshape(m, k), weight, scb, { threshold: 6 })
    const want = await ops.linear8bit(apart, weight, scb, { threshold: 6 }).floats()
    expect(relativeError(await y.floats(), want)).toBeLessThan(1e-6)
  })

  it('leading dimensions are rows', async () => {
    const x = randn(2 * 3 * 40, 1)
    const weight = Tensor.from(int8Codes(6 * 40, 2), { shape: [6, 40], device: on })
    const scb = Tensor.full([6], 2, 'float32', on)
    const cube = ops.linear8bit(Tensor.from(x, { shape: [2, 3, 40], device: on }), weight, scb)
    const flat = ops.linear8bit(Tensor.from(x, { shape: [6, 40], device: on }), weight, scb)
    expect(cube.shape).toEqual([2, 3, 6])
    expect(await cube.data()).toEqual(await flat.data())
  })

  it('bfloat16 results beyond 65504 stay finite, and overflow float16 only with bnbExact', async () => {
    const k = 64
    const x = tensorOf(new Float32Array(k).fill(3), [1, k], 'bfloat16', on)
    const weight = Tensor.from(new Int8Array(k).fill(127), { shape: [1, k], device: on })
    const scb = Tensor.from(Float32Array.of(1000), { device: on })
    const [own] = await ops.linear8bit(x, weight, scb).floats()
    expect(own).toBe(fromBfloat16(toBfloat16(192000)))
    const [exact] = await ops.linear8bit(x, weight, scb, { bnbExact: true }).floats()
    expect(exact).toBe(Infinity)
  })

  it('a column is an outlier for every row of the call', async () => {
    const x = Tensor.from(Float32Array.of(1, 2, 0.5, 4, 7, -1), { shape: [2, 3], device: on })
    const q = ops.int8QuantizeRows(x, 6)
    expect(Array.from((await q.outlierMask!.data()) as Uint8Array)).toEqual([0, 1, 0])
    // 2 counts for its row's absmax, 7 does not
    expect(Array.from((await q.rowAbsmax.data()) as Float32Array)).toEqual([2, 4])
    expect(Array.from((await q.codes.data()) as Int8Array)).toEqual([64, 0, 32, 127, 0, -32])
  })

  it('zeros, NaN, infinities and the smallest numbers', async () => {
    const rows = [
      [0, -0, 0, 0],
      [NaN, 1, 2, -2],
      [Infinity, 1, 2, 3],
      [1e-42, -1e-42, 5e-43, 0],
    ]
    const x = Tensor.from(Float32Array.from(rows.flat()), { shape: [4, 4], device: on })
    const plain = ops.int8QuantizeRows(x)
    expect(Array.from((await plain.codes.data()) as Int8Array)).toEqual(
      [
        [0, 0, 0, 0],
        [0, 64, 127, -127],
        [0, 0, 0, 0],
        [127, -127, 64, 0],
      ].flat(),
    )
    expect(Array.from((await plain.rowAbsmax.data()) as Float32Array).slice(0, 3)).toEqual([0, 2, Infinity])
    const weight = Tensor.from(new Int8Array(8).fill(1), { shape: [2, 4], device: on })
    const scb = Tensor.full([2], 127, 'float32', on)
    const y = await ops.linear8bit(x, weight, scb).floats()
    expect(Array.from(y.subarray(0, 2))).toEqual([0, 0])
    expect(Array.from(y.subarray(4, 6))).toEqual([NaN, NaN])
    // with a threshold the infinity is an outlier and reaches only its own row
    const apart = await ops.linear8bit(x, weight, scb, { threshold: 6 }).floats()
    expect(Array.from(apart.subarray(4, 6))).toEqual([Infinity, Infinity])
    expect(Array.from(apart.subarray(0, 2))).toEqual([0, 0])
  })

  it('the same in rows of any number', async () => {
    const [k, n] = [64, 3]
    const weight = Tensor.from(int8Codes(n * k, 1), { shape: [n, k], device: on })
    const scb = Tensor.from(Float32Array.of(1, 2, 3), { device: on })
    for (const m of [1, 3, 16, 40]) {
      const x = randn(m * k, 2)
      x.fill(0, 0, k)
      if (m > 1) x[k + 5] = NaN
      if (m > 2) x.set([Infinity, -Infinity], 2 * k + 9)
      const input = Tensor.from(x, { shape: [m, k], device: on })
      const plain = await ops.linear8bit(input, weight, scb).floats()
      const apart = await ops.linear8bit(input, weight, scb, { threshold: 6 }).floats()
      expect(Array.from(plain.subarray(0, n))).toEqual([0, 0, 0])
      expect(Array.from(apart.subarray(0, n))).toEqual([0, 0, 0])
      if (m > 1) {
        // a NaN counts as zero
        x[k + 5] = 0
        const without = Tensor.from(x, { shape: [m, k], device: on })
        const same = await ops.linear8bit(without, weight, scb).floats()
        expect(Array.from(plain.subarray(n, 2 * n))).toEqual(Array.from(same.subarray(n, 2 * n)))
      }
      if (m > 2) {
        expect(Array.from(plain.subarray(2 * n, 3 * n))).toEqual([NaN, NaN, NaN])
        expect(Array.from(apart.subarray(2 * n, 3 * n), Number.isFinite)).toEqual([false, false, false])
        expect(Array.from(apart.subarray(3 * n)).every(Number.isFinite)).toBe(true)
      }
    }
  })

  it.each([
    [1, 96],
    [7, 2048],
    [40, 96],
    [40, 320],
  ])('a graph of %i rows, K = %i, finds the outliers that are there when it is replayed', async (m, k) => {
    const n = 37
    const weight = Tensor.from(int8Codes(n * k, 1), { shape: [n, k], device: on })
    const scb = Tensor.from(randn(n, 2).map(abs), { device: on })
    using x = Tensor.zeros([m, k], 'float32', on)
    let y!: Tensor
    using graph = device.capture(() => {
      y = ops.linear8bit(x, weight, scb, { threshold: 6 })
    })
    for (const columns of [
      [],
      [3],
      [0, 31, 32, 64, k - 1],
      Array.from({ length: k }, (_, c) => c),
      [],
      [90],
    ]) {
      const values = randn(m * k, 3 + columns.length).map((v) => max(-5, min(5, v)))
      for (const column of columns) values[((column * 7) % m) * k + column] = 9 + (column % 5)
      x.write(values)
      graph.replay()
      using direct = ops.linear8bit(x, weight, scb, { threshold: 6 })
      expect(await y.data()).toEqual(await direct.data())
      const q = ops.int8QuantizeRows(x, 6)
      const codes = ops.int8DequantizeRows(q.codes, q.rowAbsmax, 'float32')
      const seen = await codes.floats()
      for (const column of columns) for (let r = 0; r < m; r++) seen[r * k + column] = values[r * k + column]!
      const dense = await ops.int8DequantizeRows(weight, scb, 'float32').floats()
      expect(relativeError(await y.floats(), product(seen, dense, k))).toBeLessThan(1e-5)
    }
    y.dispose()
  })

  it('scaled sums take a bias of any float dtype', async () => {
    const acc = Tensor.from(Int32Array.of(16129, -16129, 32258, 0, 1, 2), { shape: [2, 3], device: on })
    const rows = Tensor.from(Float32Array.of(1, 2), { device: on })
    const cols = Tensor.from(Float32Array.of(1, 0.5, 4), { device: on })
    for (const dtype of FLOATS) {
      const bias = tensorOf(Float32Array.of(1, 2, 3), [3], dtype, on)
      const y = await ops.int8MatmulDequantize(acc, rows, cols, bias, 'float32').floats()
      const want = [2, 1.5, 11, 1, 2 + 1 / 16129, 3 + 16 / 16129]
      y.forEach((v, i) => expect(v).toBeCloseTo(want[i]!, 5))
    }
  })

  it('refuses what does not fit, with a code', () => {
    const x = Tensor.zeros([2, 8], 'float32', on)
    const weight = Tensor.zeros([4, 8], 'int8', on)
    const scb = Tensor.zeros([4], 'float32', on)
    const code = (fn: () => unknown): string => {
      try {
        fn()
      } catch (error) {
        return (error as { code: string }).code
      }
      return 'nothing was thrown'
    }
    expect(code(() => ops.linear8bit(Tensor.zeros([2, 7], 'float32', on), weight, scb))).toBe(
      'ERR_HALFBYTE_SHAPE',
    )
    expect(code(() => ops.linear8bit(x, weight, Tensor.zeros([3], 'float32', on)))).toBe('ERR_HALFBYTE_SHAPE')
    expect(code(() => ops.linear8bit(x, x, scb))).toBe('ERR_HALFBYTE_DTYPE')
    expect(code(() => ops.linear8bit(weight, weight, scb))).toBe('ERR_HALFBYTE_DTYPE')
    expect(code(() => ops.linear8bit(x, weight, scb, { threshold: -1 }))).toBe('ERR_HALFBYTE_VALUE')
    expect(code(() => ops.int8QuantizeRows(x, NaN))).toBe('ERR_HALFBYTE_VALUE')
    expect(code(() => ops.int8QuantizeRows(weight))).toBe('ERR_HALFBYTE_DTYPE')
    expect(code(() => ops.int8DequantizeRows(weight, scb, 'int32'))).toBe('ERR_HALFBYTE_DTYPE')
    expect(code(() => ops.int8Matmul(weight, Tensor.zeros([4, 9], 'int8', on)))).toBe('ERR_HALFBYTE_SHAPE')
    const acc = Tensor.zeros([2, 4], 'int32', on)
    const two = Tensor.zeros([2], 'float32', on)
    expect(code(() => ops.int8MatmulDequantize(acc, two, two))).toBe('ERR_HALFBYTE_SHAPE')
    expect(code(() => ops.int8MatmulDequantize(x, two, scb))).toBe('ERR_HALFBYTE_DTYPE')
    expect(code(() => ops.int8MatmulDequantize(acc, two, scb, undefined, 'int8'))).toBe('ERR_HALFBYTE_DTYPE')
  })
})
