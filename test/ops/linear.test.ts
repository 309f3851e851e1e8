/** Dense linear against the product in doubles: every pair of dtypes, every kernel's range of rows, odd shapes. */
import { devices, ops, Tensor, type Device } from '../../lib/index.js'
import { thrown } from '../support/errors.js'
import { FLOATS, type FloatDType } from '../support/reference.js'
import { expectProduct, randomOperand } from '../support/product.js'

async function check(
  on: Device,
  [m, n, k]: readonly [number, number, number],
  xType: FloatDType,
  wType: FloatDType,
  extras: { bias?: FloatDType; residual?: boolean } = {},
): Promise<void> {
  const x = randomOperand([m, k], xType, on, 1)
  const w = randomOperand([n, k], wType, on, 2)
  const bias = extras.bias && randomOperand([n], extras.bias, on, 3)
  const residual = extras.residual ? randomOperand([m, n], xType, on, 4) : undefined
  const y = ops.linear(x.tensor, w.tensor, { bias: bias?.tensor, residual: residual?.tensor })
  await expectProduct(y, x.values, w.values, k, bias?.values, residual?.values)
  for (const tensor of [x.tensor, w.tensor, y, bias?.tensor, residual?.tensor]) tensor?.dispose()
}

describe.each(devices())('linear on %s', (on) => {
  describe.each(FLOATS)('x %s', (xType) => {
    it.each(FLOATS)('weight %s', async (wType) => {
      await check(on, [1, 37, 131], xType, wType)
      await check(on, [3, 30, 64], xType, wType, { bias: wType })
      await check(on, [21, 26, 300], xType, wType, { bias: 'float32', residual: true })
    })
  })

  // with a bias no library is asked
  it.each([
    [9, 16, 64],
    [17, 33, 8],
    [130, 260, 72],
    [300, 515, 328],
    [1000, 41, 136],
    [70, 2050, 200],
    [1700, 2050, 8],
  ] as const)(
    '16 bits on tensor cores: %i x %i x %i',
    async (...shape) => {
      for (const dtype of ['float16', 'bfloat16'] as const) {
        await check(on, shape, dtype, dtype, { bias: dtype })
        await check(on, shape, dtype, dtype, { bias: 'float32', residual: true })
      }
    },
    60_000,
  )

  it.each([1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 33, 48, 63, 65, 100, 256, 257])('%i rows', async (m) => {
    await check(on, [m, 25, 272], 'float32', 'float32')
    await check(on, [m, 49, 129], 'float32', 'bfloat16', { bias: 'float16', residual: true })
  })

  it.each([
    [1, 1, 1],
    [2, 1, 3],
    [7, 3, 1],
    [1, 5, 4099],
    [9, 2, 4099],
    [1, 300, 2],
    [64, 7, 255],
    [12, 23, 257],
  ] as const)('%i x %i x %i', async (...shape) => {
    await check(on, shape, 'float32', 'float32', { bias: 'float32', residual: true })
  })

  it('spreads a large weight over the threads', async () => {
    await check(on, [1, 1031, 160], 'float32', 'float32')
    await check(on, [16, 1031, 160], 'float32', 'float16')
  })

  it('takes any leading shape, and strided operands', async () => {
    const x = randomOperand([2, 3, 5, 16], 'float32', on, 1)
    const w = randomOperand([4, 16], 'float32', on, 2)
    const y = ops.linear(x.tensor, w.tensor)
    expect(y.shape).toEqual([2, 3, 5, 4])
    await expectProduct(y, x.values, w.values, 16)

    const transposed = randomOperand([16, 4], 'float32', on, 3)
    const columns = transposed.tensor.transpose(0, 1)
    const rows = Float64Array.from({ length: 64 }, (_, i) => transposed.values[(i % 16) * 4 + (i >> 4)]!)
    await expectProduct(ops.linear(x.tensor, columns), x.values, rows, 16)
  })

  it('gives no rows for no rows', async () => {
    const y = ops.linear(Tensor.empty([0, 8], 'float32', on), Tensor.empty([4, 8], 'float32', on))
    expect(y.shape).toEqual([0, 4])
    expect(await y.data()).toEqual(new Float32Array(0))
  })

  it('carries NaN and infinity to the rows and columns that have them, no further', async () => {
    const x = Tensor.from(Float32Array.of(1, 2, NaN, 4, 5, 6), { shape: [3, 2], device: on })
    const w = Tensor.from(Float32Array.of(1, 1, Infinity, 1), { shape: [2, 2], device: on })
    expect(await ops.linear(x, w).data()).toEqual(Float32Array.of(3, Infinity, NaN, NaN, 11, Infinity))
  })

  it('refuses operands that do not fit', () => {
    const x = Tensor.empty([2, 8], 'float32', on)
    const w = Tensor.empty([4, 8], 'float32', on)
    const error = (fn: () => unknown) => {
      const { code, message } = thrown(fn)
      return `${code} ${message}`
    }
    expect(error(() => ops.linear(x, Tensor.empty([4, 9], 'float32', on)))).toMatch(
      /SHAPE.*\[2, 8\].*\[4, 9\]/,
    )
    expect(error(() => ops.linear(x, Tensor.empty([8], 'float32', on)))).toMatch(/SHAPE.*\[8\].*\[N, K\]/)
    expect(error(() => ops.linear(x, Tensor.empty([4, 8], 'int8', on)))).toMatch(/DTYPE.*weight.*int8/)
    expect(error(() => ops.linear(Tensor.empty([2, 8], 'int32', on), w))).toMatch(/DTYPE.*x is int32/)
    expect(error(() => ops.linear(x, w, { bias: Tensor.empty([8], 'float32', on) }))).toMatch(/SHAPE.*bias/)
    expect(error(() => ops.linear(x, w, { residual: Tensor.empty([2, 4], 'float16', on) }))).toMatch(/DTYPE/)
    expect(error(() => ops.linear(x, w, { residual: Tensor.empty([1, 4], 'float32', on) }))).toMatch(/SHAPE/)
  })
})
