/** fill, copy, concat, row gathers, mean, count of non-finite values: shapes, strides, dtypes. */
import { devices, ops, Tensor, type DType } from '../../lib/index.js'
import { thrown } from '../support/errors.js'
import { FLOATS, fromBfloat16, fromFloat16, randn, rounded } from '../support/reference.js'
import { numbers } from '../support/values.js'

const DTYPES: DType[] = ['float32', 'float16', 'bfloat16', 'int8', 'uint8', 'int32', 'int64']

describe.each(devices())('layout on %s', (device) => {
  const from = (data: ArrayLike<number>, shape: number[], dtype: DType = 'float32') =>
    Tensor.from(Float32Array.from(data), { shape, device }).to(dtype)

  describe.each(DTYPES)('%s', (dtype) => {
    it.each([[[0]], [[1]], [[]], [[7]], [[3, 0, 2]], [[70001]], [[2, 1, 3, 1, 2, 2]]])(
      'fills %j',
      async (shape) => {
        const y = Tensor.full(shape, 5, dtype, device)
        expect((await numbers(y)).every((x) => x === 5)).toBe(true)
        expect((await y.data()).length).toBe(shape.reduce((a, b) => a * b, 1))
      },
    )

    it('fills a strided view and leaves the rest', async () => {
      const y = Tensor.zeros([4, 5, 3], dtype, device)
      ops.fillInto(y.slice(1, 1, 3).transpose(0, 2), 9)
      const values = await numbers(y)
      values.forEach((v, i) => expect(v).toBe([1, 2].includes(Math.floor(i / 3) % 5) ? 9 : 0))
    })

    it.each(DTYPES)('converts to %s', async (to) => {
      const source = dtype === 'uint8' ? [0, 1, 2, 100, 127] : [0, 1, -1, 2.75, -2.75, 100, -100, 127]
      const x = from(source, [source.length], dtype)
      const held = await numbers(x)
      const isFloat = (FLOATS as readonly string[]).includes(to)
      const expected = held.map((v) => (isFloat ? rounded(v, to) : Math.trunc(v)))
      const fits = (v: number) => to !== 'uint8' || v >= 0
      const actual = await numbers(x.to(to))
      actual.forEach((v, i) => fits(expected[i]!) && expect(v).toBe(expected[i] === 0 ? 0 : expected[i]))
    })
  })

  it('saturates floats outside an integer range and turns NaN into 0', async () => {
    const x = from([1e30, -1e30, NaN, Infinity, -Infinity], [5])
    expect(await x.to('int8').data()).toEqual(Int8Array.of(127, -128, 0, 127, -128))
    expect(await x.to('uint8').data()).toEqual(Uint8Array.of(255, 0, 0, 255, 0))
    expect(await x.to('int32').data()).toEqual(
      Int32Array.of(2147483647, -2147483648, 0, 2147483647, -2147483648),
    )
    const most = 9223372036854775807n
    expect(await x.to('int64').data()).toEqual(BigInt64Array.of(most, -most - 1n, 0n, most, -most - 1n))
  })

  it.each(['float16', 'bfloat16'] as const)('rounds float32 to %s, ties to even', async (dtype) => {
    const values = new Float32Array(4099)
    const random = randn(values.length, 1)
    const edges = [
      65504, 65519.99, 65520, -65536, 6e-8, 2.9e-8, 2.98e-8, 6.1e-5, 1.00048828125, 3.3895e38, -0, 0,
    ]
    edges.push(1.00390625, 1.01171875, Infinity, -Infinity, 1e-40)
    values.forEach((_, i) => (values[i] = edges[i] ?? random[i]! * 2 ** ((i % 60) - 40)))
    const actual = await numbers(from(values, [values.length]).to(dtype))
    expect(actual).toEqual(Array.from(values, (v) => rounded(v, dtype)))
  })

  it('keeps every bit pattern of the 16-bit floats, through float32 and back', async () => {
    const bits = Uint16Array.from({ length: 65536 }, (_, i) => i)
    for (const dtype of ['float16', 'bfloat16'] as const) {
      const decode = dtype === 'float16' ? fromFloat16 : fromBfloat16
      const back = Tensor.from(bits, { dtype, device }).to('float32').to(dtype)
      const data = (await back.data()) as Uint16Array
      const wrong = data.findIndex((b, i) => b !== i && !Number.isNaN(decode(i)))
      expect(wrong).toBe(-1)
      expect(data.every((b, i) => Number.isNaN(decode(b)) === Number.isNaN(decode(i)))).toBe(true)
    }
  })

  it.each([
    [
      [3, 5],
      [1, 0],
    ],
    [
      [70, 131],
      [1, 0],
    ],
    [
      [2, 3, 4],
      [2, 0, 1],
    ],
    [
      [33, 1, 65],
      [2, 1, 0],
    ],
    [
      [2, 3, 4, 2, 3, 2],
      [5, 3, 1, 0, 2, 4],
    ],
    [
      [5, 64, 40],
      [0, 2, 1],
    ],
  ])('copies %j permuted by %j', async (shape, order) => {
    const n = shape.reduce((a, b) => a * b, 1)
    const x = Tensor.from(
      Int32Array.from({ length: n }, (_, i) => i),
      { shape, device },
    )
    const permuted = x.permute(...order)
    const strides = permuted.strides
    const expected: number[] = []
    const walk = (d: number, at: number) => {
      if (d === permuted.ndim) expected.push(at)
      else for (let i = 0; i < permuted.shape[d]!; i++) walk(d + 1, at + i * strides[d]!)
    }
    walk(0, 0)
    expect(Array.from((await permuted.data()) as Int32Array)).toEqual(expected)
    const narrow = x
      .to('float16')
      .permute(...order)
      .to('float32')
    expect(Array.from((await narrow.data()) as Float32Array)).toEqual(
      expected.map((v) => rounded(v, 'float16')),
    )
  })

  describe.each(DTYPES)('copies of %s', (dtype) => {
    it.each([
      [
        [65, 100],
        [1, 0],
      ],
      [
        [3, 70, 129],
        [0, 2, 1],
      ],
      [
        [70, 3, 33],
        [2, 1, 0],
      ],
      [
        [5, 40, 64],
        [1, 0, 2],
      ],
      [
        [20, 7, 18],
        [1, 2, 0],
      ],
    ])('%j permuted by %j, into a permuted view too', async (shape, order) => {
      const n = shape.reduce((a, b) => a * b, 1)
      const values = Float32Array.from({ length: n }, (_, i) => (i * 37) % 101)
      const x = from(values, shape, dtype)
      const permuted = x.permute(...order)
      const strides = permuted.strides
      const expected: number[] = []
      const walk = (d: number, at: number) => {
        if (d === permuted.ndim) expected.push(values[at]!)
        else for (let i = 0; i < permuted.shape[d]!; i++) walk(d + 1, at + i * strides[d]!)
      }
      walk(0, 0)
      expect(await numbers(permuted.clone())).toEqual(expected)
      const back = Tensor.zeros(shape, dtype, device)
      back.permute(...order).copyFrom(permuted.clone())
      expect(await numbers(back)).toEqual([...values])
    })

    it('columns of a matrix, at any offset and of any width', async () => {
      const values = Float32Array.from({ length: 40 * 200 }, (_, i) => (i * 37) % 101)
      const x = from(values, [40, 200], dtype)
      for (const [begin, end] of [
        [0, 128],
        [8, 136],
        [16, 200],
        [4, 68],
        [1, 65],
        [3, 36],
      ] as const) {
        const expected = Array.from({ length: 40 }, (_, r) => [
          ...values.subarray(200 * r + begin, 200 * r + end),
        ]).flat()
        const part = x.slice(1, begin, end)
        expect(await numbers(part.clone())).toEqual(expected)
        const wide = part.to(dtype === 'float32' ? 'bfloat16' : 'float32')
        expect(await numbers(wide)).toEqual(expected)
        expect(await numbers(part.to(dtype === 'int64' ? 'int32' : 'int64'))).toEqual(expected)
        const y = Tensor.zeros([40, 200], dtype, device)
        y.slice(1, begin, end).copyFrom(part.clone())
        const kept = values.map((v, i) => (i % 200 >= begin && i % 200 < end ? v : 0))
        expect(await numbers(y)).toEqual([...kept])
      }
    })
  })

  it('reads elements at odd byte offsets of a parent and broadcasts in copies', async () => {
    const x = from([1, 2, 3, 4, 5], [5], 'bfloat16').slice(0, 1, 4)
    expect(await numbers(x.to('float32'))).toEqual([2, 3, 4])
    expect(await numbers(from([1, 2], [2, 1]).expand(2, 3).contiguous())).toEqual([1, 1, 1, 2, 2, 2])
  })

  it('concatenates along each dimension', async () => {
    const a = from([1, 2, 3, 4], [2, 2])
    const b = from([5, 6], [2, 1])
    expect(await numbers(ops.concat([a, b], 1))).toEqual([1, 2, 5, 3, 4, 6])
    expect(await numbers(ops.concat([a, a.slice(0, 0, 1)]))).toEqual([1, 2, 3, 4, 1, 2])
  })

  describe.each(FLOATS)('gatherRows of %s', (dtype) => {
    it.each([1, 4, 33, 64, 100, 1000])('takes rows of %i', async (cols) => {
      const table = from(randn(50 * cols, 3), [50, cols], dtype)
      const rows = await numbers(table)
      const wanted = Array.from({ length: 301 }, (_, i) => (i * 37) % 50)
      const y = ops.gatherRows(table, Tensor.from(wanted, { dtype: 'int32', device }))
      expect(await numbers(y)).toEqual(wanted.flatMap((r) => rows.slice(cols * r, cols * r + cols)))
    })

    it.each(['int32', 'int64'] as const)('takes %s ids of any shape', async (ids) => {
      const table = from(randn(7 * 5, 3), [7, 5], dtype)
      const rows = await numbers(table)
      const wanted = [
        [6, 0, 3],
        [3, 3, 1],
      ]
      const y = ops.gatherRows(table, Tensor.from(wanted, { dtype: ids, device }))
      expect(y.shape).toEqual([2, 3, 5])
      expect(await numbers(y)).toEqual(wanted.flat().flatMap((r) => rows.slice(5 * r, 5 * r + 5)))
      const outside = await numbers(ops.gatherRows(table, Tensor.from([-1, 7, 2], { dtype: ids, device })))
      expect(outside.slice(0, 10).every(Number.isNaN)).toBe(true)
      expect(outside.slice(10)).toEqual(rows.slice(10, 15))
      expect(ops.gatherRows(table, Tensor.empty([0], ids, device)).shape).toEqual([0, 5])
    })
  })

  it('takes the mean in double', async () => {
    const x = new Float32Array(300001).fill(0.1)
    x[0] = 1e7
    const exact = x.reduce((sum, v) => sum + v, 0) / x.length
    expect(await ops.mean(from(x, [x.length])).item()).toBe(Math.fround(exact))
    expect(await ops.mean(from([3], [1])).item()).toBe(3)
  })

  it.each(FLOATS)('counts NaN and infinities of %s', async (dtype) => {
    for (const n of [1, 31, 100003]) {
      const x = new Float32Array(n)
      x[0] = NaN
      x[n >> 1] = -Infinity
      x[n - 1] = Infinity
      const places = new Set([0, n >> 1, n - 1]).size
      expect(await ops.countNonfinite(from(x, [n], dtype)).item()).toBe(places)
    }
    expect(await ops.countNonfinite(Tensor.full([5], 1e4, dtype, device)).item()).toBe(0)
  })

  it('refuses what does not fit', () => {
    const a = from([1, 2, 3, 4], [2, 2])
    const code = (body: () => unknown) => thrown(body).code
    expect(code(() => ops.copyInto(a, from([1, 2], [2])))).toBe('ERR_HALFBYTE_SHAPE')
    expect(code(() => ops.gatherRows(a, a))).toBe('ERR_HALFBYTE_DTYPE')
    expect(code(() => ops.mean(a.to('float16')))).toBe('ERR_HALFBYTE_DTYPE')
    expect(code(() => ops.concat([]))).toBe('ERR_HALFBYTE_SHAPE')
    expect(code(() => ops.concat([a, from([1, 2, 3], [1, 3])]))).toBe('ERR_HALFBYTE_SHAPE')
  })
})
