/** Products of matrices in doubles, and how near a device must come to them. */
import { DTYPES, Tensor, type Device } from '../../lib/index.js'
import {
  fromBfloat16,
  fromFloat16,
  relativeError,
  toBfloat16,
  toFloat16,
  uniform,
  type FloatDType,
} from './reference.js'

/** The rounding of the compute dtype; sums are fp32. */
const PRODUCT_TOLERANCE: Record<FloatDType, number> = { float32: 1e-6, float16: 5e-4, bfloat16: 4e-3 }

const FROM = { float32: (v: number) => v, float16: fromFloat16, bfloat16: fromBfloat16 }

export interface Operand {
  tensor: Tensor
  values: Float64Array
}

/** A random tensor and the values it holds. */
export function randomOperand(
  shape: readonly number[],
  dtype: FloatDType,
  device: Device,
  seed: number,
): Operand {
  const size = shape.reduce((a, b) => a * b, 1)
  const next = uniform(seed)
  const data = new DTYPES[dtype].array(new ArrayBuffer(size * DTYPES[dtype].bytes))
  const values = new Float64Array(size)
  for (let i = 0; i < size; ++i) {
    const x = 2 * next() - 1
    data[i] = dtype === 'float16' ? toFloat16(x) : dtype === 'bfloat16' ? toBfloat16(x) : x
    values[i] = FROM[dtype](data[i] as number)
  }
  return { tensor: Tensor.from(data, { dtype, shape, device }), values }
}

/** x [M, K] w [N, K]^T + bias [N] + residual [M, N]. */
export function product(
  x: ArrayLike<number>,
  w: ArrayLike<number>,
  k: number,
  bias?: ArrayLike<number>,
  residual?: ArrayLike<number>,
): Float64Array {
  const n = w.length / k
  const m = x.length / k
  const y = new Float64Array(m * n)
  for (let i = 0; i < m; ++i) {
    for (let j = 0; j < n; ++j) {
      let sum = (bias?.[j] ?? 0) + (residual?.[i * n + j] ?? 0)
      for (let t = 0; t < k; ++t) sum += x[i * k + t]! * w[j * k + t]!
      y[i * n + j] = sum
    }
  }
  return y
}

/** Expects y [..., N] = x [..., K] w [N, K]^T + bias + residual. */
export async function expectProduct(
  y: Tensor,
  x: Float64Array,
  w: Float64Array,
  k: number,
  bias?: Float64Array,
  residual?: Float64Array,
): Promise<void> {
  const expected = product(x, w, k, bias, residual)
  const data = (await y.data()) as ArrayLike<number>
  const dtype = y.dtype as FloatDType
  const values = new Float64Array(data.length)
  for (let i = 0; i < values.length; ++i) values[i] = FROM[dtype](data[i]!)
  expect(relativeError(values, expected)).toBeLessThan(PRODUCT_TOLERANCE[dtype])
}
