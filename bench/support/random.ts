/** Reproducible operands. */
import { Tensor, type Device } from 'halfbyte'

/** After so many numbers they repeat: no kernel is faster for it, and a large weight is made in no time. */
const PERIOD = 1_000_003

/** Normally distributed numbers, from a small generator. */
export function normal(size: number, scale: number, seed = 1): Float32Array {
  let state = seed >>> 0 || 1
  const uniform = () => {
    state ^= state << 13
    state ^= state >>> 17
    state ^= state << 5
    return (state >>> 0) / 4294967296
  }
  const values = new Float32Array(size)
  const distinct = Math.min(size, PERIOD)
  for (let i = 0; i < distinct; i += 2) {
    const radius = Math.sqrt(-2 * Math.log(1 - uniform())) * scale
    const angle = 2 * Math.PI * uniform()
    values[i] = radius * Math.cos(angle)
    if (i + 1 < distinct) values[i + 1] = radius * Math.sin(angle)
  }
  for (let i = distinct; i < size; i += distinct) values.copyWithin(i, 0, Math.min(distinct, size - i))
  return values
}

export function normalTensor(shape: readonly number[], scale: number, device: Device, seed = 1): Tensor {
  const size = shape.reduce((product, n) => product * n, 1)
  return Tensor.from(normal(size, scale, seed), { shape, device, copy: false })
}
