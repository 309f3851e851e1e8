/** RMSNorm and LayerNorm against doubles. */
import { devices, HalfbyteError, ops, Tensor } from '../../lib/index.js'
import { FLOATS, randn, relativeError, rounded, TOLERANCE, type FloatDType } from '../support/reference.js'

// looking up globals is slow inside jest
const { sqrt } = Math

interface Inputs {
  x: Float32Array
  weight: Float32Array | undefined
  bias: Float32Array | undefined
}

function reference(
  kind: 'rms' | 'layer',
  rows: number,
  cols: number,
  o: Inputs,
  eps: number,
  offset = 0,
): number[] {
  return Array.from({ length: rows }, (_, r) => {
    const row = Array.from(o.x.subarray(r * cols, (r + 1) * cols))
    const mean = kind === 'layer' ? row.reduce((a, b) => a + b, 0) / cols : 0
    const variance = row.reduce((a, b) => a + (b - mean) ** 2, 0) / cols
    const scale = 1 / sqrt(variance + eps)
    return row.map((v, c) => (v - mean) * scale * ((o.weight?.[c] ?? 1) + offset) + (o.bias?.[c] ?? 0))
  }).flat()
}

const SHAPES = [
  [0, 8],
  [1, 1],
  [1, 15],
  [3, 16],
  [2, 17],
  [7, 64],
  [5, 129],
  [6, 1000],
  [1, 4096],
  [40, 256],
  [2, 8200],
  [1, 20000],
  [1, 40008],
] as const

describe.each(devices())('norms on %s', (device) => {
  const tensor = (data: Float32Array, shape: readonly number[], dtype: FloatDType) =>
    Tensor.from(data, { shape, device }).to(dtype)
  const read = async (t: Tensor) => t.floats()

  describe.each(FLOATS)('%s', (dtype) => {
    it.each(SHAPES)('[%i, %i]', async (rows, cols) => {
      const x = tensor(
        randn(rows * cols, 1).map((v) => 3 * v + 1),
        [rows, cols],
        dtype,
      )
      const residual = tensor(randn(rows * cols, 2), [rows, cols], dtype)
      for (const parameters of FLOATS) {
        const weight = tensor(randn(cols, 3), [cols], parameters)
        const bias = tensor(randn(cols, 4), [cols], parameters)
        const o = { x: await read(x), weight: await read(weight), bias: undefined }
        const check = async (y: Tensor, expected: number[]) => {
          expect(y.dtype).toBe(dtype)
          expect(relativeError(await read(y), expected)).toBeLessThan(TOLERANCE[dtype])
        }
        await check(ops.rmsNorm(x, weight, 1e-6), reference('rms', rows, cols, o, 1e-6))
        await check(ops.rmsNorm(x, weight, 1e-6, 1), reference('rms', rows, cols, o, 1e-6, 1))
        const layer = { ...o, bias: await read(bias) }
        await check(ops.layerNorm(x, weight, bias, 1e-5), reference('layer', rows, cols, layer, 1e-5))
        await check(ops.layerNorm(x, weight, undefined, 1e-5), reference('layer', rows, cols, o, 1e-5))

        const [a, b] = [await read(x), await read(residual)]
        const sum = a.map((v, i) => rounded(v + b[i]!, dtype))
        const withSum = { ...o, x: sum }
        const rms = ops.rmsNorm(x, weight, 1e-6, 0, residual)
        expect(await read(rms.sum)).toEqual(sum)
        await check(rms.y, reference('rms', rows, cols, withSum, 1e-6))
        const normed = ops.layerNorm(x, weight, bias, 1e-5, residual)
        expect(await read(normed.sum)).toEqual(sum)
        await check(normed.y, reference('layer', rows, cols, { ...withSum, bias: layer.bias }, 1e-5))
      }
      const bare = { x: await read(x), weight: undefined, bias: undefined }
      for (const kind of ['rms', 'layer'] as const) {
        const y =
          kind === 'rms' ? ops.rmsNorm(x, undefined, 1e-5) : ops.layerNorm(x, undefined, undefined, 1e-5)
        const wanted = reference(kind, rows, cols, bare, 1e-5)
        expect(relativeError(await read(y), wanted)).toBeLessThan(TOLERANCE[dtype])
      }
    })
  })

  it('takes strided rows and more dimensions', async () => {
    const x = Tensor.from(randn(2 * 3 * 4, 5), { shape: [4, 3, 2], device }).permute(2, 1, 0)
    const y = ops.rmsNorm(x, Tensor.full([4], 1, 'float32', device), 1e-6)
    const o = { x: await x.floats(), weight: undefined, bias: undefined }
    expect(y.shape).toEqual([2, 3, 4])
    expect(relativeError(await y.floats(), reference('rms', 6, 4, o, 1e-6))).toBeLessThan(1e-6)
  })

  it('keeps a small variance beside a large mean', async () => {
    const noise = randn(512, 6)
    const x = Tensor.from(
      noise.map((v) => 1000 + v),
      { shape: [1, 512], device },
    )
    const o = { x: await x.floats(), weight: undefined, bias: undefined }
    const y = ops.layerNorm(x, undefined, undefined, 1e-5)
    expect(relativeError(await y.floats(), reference('layer', 1, 512, o, 1e-5))).toBeLessThan(1e-4)
  })

  it('carries NaN through its row only', async () => {
    const x = Tensor.from(Float32Array.of(1, NaN, 3, 4), { shape: [2, 2], device })
    const y = await ops.rmsNorm(x, Tensor.full([2], 1, 'float32', device), 0).floats()
    expect(Array.from(y, Number.isNaN)).toEqual([true, true, false, false])
  })

  it('refuses parameters of another size', () => {
    const x = Tensor.zeros([2, 4], 'float32', device)
    expect(() => ops.rmsNorm(x, Tensor.zeros([3], 'float32', device), 1e-6)).toThrow(HalfbyteError)
    expect(() => ops.layerNorm(x, undefined, Tensor.zeros([5], 'float32', device), 1e-6)).toThrow(
      HalfbyteError,
    )
    expect(() => ops.rmsNorm(x.to('int32'), Tensor.zeros([4], 'float32', device), 1e-6)).toThrow(
      HalfbyteError,
    )
    const half = Tensor.zeros([4], 'float16', device)
    expect(() => ops.layerNorm(x, half, Tensor.zeros([4], 'float32', device), 1e-6)).toThrow(HalfbyteError)
  })
})
