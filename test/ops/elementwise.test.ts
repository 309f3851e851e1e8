/** Arithmetic and activations: shapes, strides, dtypes. */
import { devices, ops, Tensor, type DType } from '../../lib/index.js'
import { thrown } from '../support/errors.js'
import { FLOATS, randn, relativeError, rounded, TOLERANCE } from '../support/reference.js'
import { numbers } from '../support/values.js'

describe.each(devices())('elementwise ops on %s', (device) => {
  const from = (data: ArrayLike<number>, shape: number[], dtype: DType = 'float32') =>
    Tensor.from(Float32Array.from(data), { shape, device }).to(dtype)

  const BINARY = {
    add: (a: number, b: number) => a + b,
    sub: (a: number, b: number) => a - b,
    mul: (a: number, b: number) => a * b,
    div: (a: number, b: number) => a / b,
    minimum: Math.min,
    maximum: Math.max,
  }
  describe.each(Object.entries(BINARY))('%s', (name, f) => {
    const op = ops[name as keyof typeof BINARY]
    it.each(FLOATS)('broadcasts in %s', async (dtype) => {
      const cases: [number[], number[]][] = [
        [
          [5, 37],
          [5, 37],
        ],
        [[5, 37], [37]],
        [
          [5, 1],
          [1, 37],
        ],
        [
          [3, 1, 2],
          [4, 1],
        ],
        [[1], [0, 3]],
        [[], [2, 2]],
        [[20000], [1]],
      ]
      for (const [i, [left, right]] of cases.entries()) {
        const size = (s: number[]) => s.reduce((a, b) => a * b, 1)
        const a = from(randn(size(left), 2 * i), left, dtype)
        const b = from(
          randn(size(right), 2 * i + 1).map((v) => v + Math.sign(v)),
          right,
          dtype,
        )
        const y = op(a, b)
        const [wideA, wideB] = [a.expand(...y.shape), b.expand(...y.shape)]
        const [va, vb] = [await numbers(wideA.contiguous()), await numbers(wideB.contiguous())]
        expect(await numbers(y)).toEqual(va.map((v, k) => rounded(f(v, vb[k]!), dtype)))
      }
    })

    it('takes transposed operands and numbers', async () => {
      const a = from(randn(12, 5), [3, 4])
      const b = from(randn(12, 6), [4, 3])
      const [va, vb] = [await numbers(a.transpose(0, 1)), await numbers(b)]
      expect(await numbers(op(a.transpose(0, 1), b))).toEqual(va.map((v, k) => Math.fround(f(v, vb[k]!))))
      expect(await numbers(op(a, 3))).toEqual((await numbers(a)).map((v) => Math.fround(f(v, 3))))
    })

    it('works on int32', async () => {
      const a = Tensor.from(Int32Array.of(7, -7, 2147483647, 5), { device })
      const b = Tensor.from(Int32Array.of(2, 2, 1, -3), { device })
      const wrap = (x: number) => Math.trunc(x) | 0
      expect(await numbers(op(a, b))).toEqual([f(7, 2), f(-7, 2), f(2147483647, 1), f(5, -3)].map(wrap))
    })
  })

  it('divides int32 by zero and by -1 without harm', async () => {
    const a = Tensor.from(Int32Array.of(-2147483648, 5), { device })
    const b = Tensor.from(Int32Array.of(-1, 0), { device })
    expect(await numbers(ops.div(a, b))).toEqual([-2147483648, 0])
  })

  it('carries NaN through minimum and maximum', async () => {
    const a = from([NaN, 1, NaN, 2], [4])
    const b = from([1, NaN, NaN, 3], [4])
    expect(await numbers(ops.minimum(a, b))).toEqual([NaN, NaN, NaN, 2])
    expect(await numbers(ops.maximum(a, b))).toEqual([NaN, NaN, NaN, 3])
  })

  it('adds in place', async () => {
    const a = from([1, 2, 3, 4], [2, 2])
    ops.addInto(a, from([10, 20], [2]))
    expect(await numbers(a)).toEqual([11, 22, 13, 24])
  })

  const erf = (x: number): number => {
    // Taylor near zero, a continued fraction for the complement elsewhere
    if (Math.abs(x) < 2.5) {
      let term = x
      let sum = x
      for (let n = 1; n < 80; n++) {
        term *= -(x * x) / n
        sum += term / (2 * n + 1)
      }
      return (2 / Math.sqrt(Math.PI)) * sum
    }
    let fraction = 0
    for (let n = 80; n > 0; n--) fraction = n / 2 / (Math.abs(x) + fraction)
    const complement = Math.exp(-x * x) / Math.sqrt(Math.PI) / (Math.abs(x) + fraction)
    return Math.sign(x) * (1 - complement)
  }
  const sigmoid = (x: number) => 1 / (1 + Math.exp(-x))
  const ACTIVATIONS: Record<ops.Activation, (x: number) => number> = {
    none: (x) => x,
    silu: (x) => x * sigmoid(x),
    gelu: (x) => 0.5 * x * (1 + erf(x / Math.SQRT2)),
    gelu_tanh: (x) => x * sigmoid(2 * Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)),
    relu: (x) => Math.max(x, 0),
    sigmoid,
    tanh: Math.tanh,
    exp: Math.exp,
    neg: (x) => -x,
  }
  describe.each(Object.entries(ACTIVATIONS))('%s', (name, f) => {
    const act = name as ops.Activation
    it.each(FLOATS)('equals the exact function in %s', async (dtype) => {
      for (const n of [0, 1, 15, 16, 17, 1000, 20011]) {
        const x = from(
          randn(n, n).map((v) => 2 * v),
          [n],
          dtype,
        )
        const input = await numbers(x)
        const y = await numbers(ops.activation(x, act))
        expect(y).toHaveLength(n)
        y.forEach((v, i) => {
          const exact = f(input[i]!)
          const unit = dtype === 'float32' ? 1e-6 : dtype === 'float16' ? 2 ** -11 : 2 ** -8
          if (Math.abs(v - exact) > unit * Math.abs(exact) + 1e-7)
            expect([input[i], v]).toEqual([input[i], exact])
        })
      }
    })

    it.each(FLOATS)('gates in %s, rows of one product', async (dtype) => {
      for (const [rows, cols] of [
        [1, 1],
        [3, 17],
        [0, 4],
        [5, 1000],
      ] as const) {
        const both = from(randn(rows * cols * 2, cols), [rows, 2 * cols], dtype)
        const [gate, up] = [both.slice(1, 0, cols), both.slice(1, cols, 2 * cols)]
        const [g, u] = [await numbers(gate), await numbers(up)]
        const exact = g.map((v, i) => f(v) * u[i]!)
        const y = ops.gatedActivation(gate, up, act)
        expect(y.shape).toEqual([rows, cols])
        expect(relativeError(await numbers(y), exact)).toBeLessThan(TOLERANCE[dtype])
      }
    })
  })

  it('has finite or exact ends of the activations', async () => {
    const x = from([1e4, -1e4, 0, NaN], [4])
    const ends = {
      silu: [1e4, 0],
      gelu: [1e4, 0],
      gelu_tanh: [1e4, 0],
      sigmoid: [1, 0],
      tanh: [1, -1],
    } as const
    for (const [act, [high, low]] of Object.entries(ends)) {
      const y = await numbers(ops.activation(x, act as ops.Activation))
      expect(y[0]).toBe(high)
      expect(y[1]).toBeCloseTo(low, 30)
      expect(y[2]).toBe(act === 'sigmoid' ? 0.5 : 0)
      expect(y[3]).toBeNaN()
    }
    expect(await numbers(ops.activation(from([1000, -1000], [2]), 'exp'))).toEqual([Infinity, 0])
  })

  it('refuses what does not fit', () => {
    const a = from([1, 2, 3, 4], [2, 2])
    const code = (body: () => unknown) => thrown(body).code
    expect(code(() => ops.add(a, from([1, 2, 3], [3])))).toBe('ERR_HALFBYTE_SHAPE')
    expect(code(() => ops.add(a, a.to('float16')))).toBe('ERR_HALFBYTE_DTYPE')
    expect(code(() => ops.add(a.to('int8'), a.to('int8')))).toBe('ERR_HALFBYTE_DTYPE')
    expect(code(() => ops.activation(a.to('int32'), 'silu'))).toBe('ERR_HALFBYTE_DTYPE')
    expect(code(() => ops.activation(a, 'nope' as ops.Activation))).toBe('ERR_HALFBYTE_VALUE')
    expect(code(() => ops.gatedActivation(a, from([1, 2], [2]), 'silu'))).toBe('ERR_HALFBYTE_SHAPE')
  })
})
