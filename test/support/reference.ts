/** Seeded random data, 16-bit floats, and what it takes to compare with a computation in doubles. */
import { type DType } from '../../lib/index.js'

// looking up globals is slow inside jest
const { abs, cos, floor, fround, imul, log, max, sqrt, PI } = Math

/** Uniform numbers in [0, 1), the same for the same seed (a 32-bit mixing generator). */
export function uniform(seed: number): () => number {
  let state = seed >>> 0
  return () => {
    state = (state + 0x9e3779b9) >>> 0
    let z = state
    z = imul(z ^ (z >>> 16), 0x85ebca6b)
    z = imul(z ^ (z >>> 13), 0xc2b2ae35)
    return ((z ^ (z >>> 16)) >>> 0) / 2 ** 32
  }
}

/** Numbers in [-1, 1), the same for the same seed. */
export function noise(n: number, seed = 1): Float32Array {
  const next = uniform(seed)
  return Float32Array.from({ length: n }, () => 2 * next() - 1)
}

/** Standard normal numbers (Box-Muller). */
export function randn(n: number, seed: number): Float32Array {
  const next = uniform(seed)
  const values = new Float32Array(n)
  for (let i = 0; i < n; i++) {
    values[i] = sqrt(-2 * log(1 - next())) * cos(2 * PI * next())
  }
  return values
}

/** int8 codes, the same for the same seed. */
export function int8Codes(n: number, seed: number): Int8Array {
  const next = uniform(seed)
  return Int8Array.from({ length: n }, () => floor(next() * 256) - 128)
}

/** 2^-5 to 2^24. */
const POWERS = Float64Array.from({ length: 30 }, (_, i) => 2 ** (i - 5))

const word = new Float32Array(1)
const bits = new Uint32Array(word.buffer)

/** To the nearest bfloat16, ties to even, as raw bits. */
export function toBfloat16(x: number): number {
  word[0] = x
  const b = bits[0]!
  if ((b & 0x7fffffff) > 0x7f800000) return (b >>> 16) | 0x40
  return ((b + 0x7fff + ((b >>> 16) & 1)) / 65536) & 0xffff
}

export function fromBfloat16(b: number): number {
  bits[0] = (b << 16) >>> 0
  return word[0]!
}

const double = new Float64Array(1)
const halves = new Uint32Array(double.buffer)

/** floor(log2(x)) of a normal number above 0. */
function exponentOf(x: number): number {
  double[0] = x
  return (halves[1]! >>> 20) - 1023
}

/** To the nearest float16, ties to even, subnormals included, as raw bits. */
export function toFloat16(x: number): number {
  const sign = x < 0 || (x === 0 && 1 / x < 0) ? 0x8000 : 0
  const a = abs(x)
  if (a !== a) return 0x7e00
  if (a >= 65520) return sign | 0x7c00
  // in units of the last place at this size; below 2^-14 it stays that of the subnormals
  const exponent = max(exponentOf(a), -14)
  const units = a * POWERS[10 - exponent + 5]!
  let steps = floor(units)
  const rest = units - steps
  if (rest > 0.5 || (rest === 0.5 && steps % 2 === 1)) steps++
  // 1024 steps are one more in the exponent, of subnormals too
  return sign | (((exponent + 14) << 10) + steps)
}

export function fromFloat16(b: number): number {
  const sign = b & 0x8000 ? -1 : 1
  const exponent = (b >> 10) & 31
  const mantissa = b & 1023
  if (exponent === 31) return mantissa ? NaN : sign * Infinity
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + mantissa / 1024) : mantissa * 2 ** -24)
}

/** The values of float16 bits. */
export const halfValues = (bits: ArrayLike<number>): number[] => Array.from(bits, (b) => fromFloat16(b))

export const FLOATS = ['float32', 'float16', 'bfloat16'] as const
export type FloatDType = (typeof FLOATS)[number]

/** The value that a dtype holds in place of x. */
export function rounded(x: number, dtype: DType): number {
  if (dtype === 'float16') return fromFloat16(toFloat16(x))
  if (dtype === 'bfloat16') return fromBfloat16(toBfloat16(x))
  return fround(x)
}

/** |a - b| / |b| in the Frobenius norm. */
export function relativeError(a: ArrayLike<number>, b: ArrayLike<number>): number {
  if (a.length !== b.length) return 1 / 0
  let difference = 0
  let size = 0
  for (let i = 0; i < b.length; i++) {
    difference += (a[i]! - b[i]!) ** 2
    size += b[i]! ** 2
  }
  return sqrt(difference / (size || 1))
}

/** Expects no element to be further from the other than that. */
export function expectClose(a: ArrayLike<number>, b: ArrayLike<number>, limit = 1e-5): void {
  expect(a.length).toBe(b.length)
  let worst = 0
  for (let i = 0; i < b.length; i++) worst = max(worst, abs(a[i]! - b[i]!))
  expect(worst).toBeLessThan(limit)
}

/** What one rounding to a dtype may cost. */
export const TOLERANCE: Record<FloatDType, number> = { float32: 1e-6, float16: 6e-4, bfloat16: 5e-3 }
