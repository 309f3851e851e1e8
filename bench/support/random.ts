/** Reproducible operands. */
import { Tensor, type Device } from 'halfbyte'

/** Normally distributed numbers, from a small counter-based generator. */
export function normal(size: number, scale: number, seed = 1): Float32Array {
  let state = seed >>> 0 || 1
  const uniform = () => {
    state ^= state << 13
    state ^= state >>> 17
    state ^= state << 5
    return (state >>> 0) / 4294967296
  }
  const values = new Float32Array(size)
  for (let i = 0; i < size; i += 2) {
    const radius = Math.sqrt(-2 * Math.log(1 - uniform())) * scale
    const angle = 2 * Math.PI * uniform()
    values[i] = radius * Math.cos(angle)
    if (i + 1 < size) values[i + 1] = radius * Math.sin(angle)
  }
  return values
}

export function normalTensor(shape: readonly number[], scale: number, device: Device, seed = 1): Tensor {
  const size = shape.reduce((product, n) => product * n, 1)
  return Tensor.from(normal(size, scale, seed), { shape, device, copy: false })
}
