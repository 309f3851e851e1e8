/** First values of parameters, from one seeded generator of the process: same seed, same model. */
import type { Device } from '../tensor/device.js'
import { sizeOf, type Shape } from '../tensor/shape.js'
import { Tensor } from '../tensor/tensor.js'

let state = 0x9e3779b9

/** Restarts the generator that new modules draw their first values from. */
export function manualSeed(seed: number): void {
  state = (Math.trunc(seed) ^ 0x9e3779b9) >>> 0
}

/** Uniform in [0, 1) with 32 random bits: a counter through a 32-bit mixing function (splitmix32). */
function random(): number {
  state = (state + 0x9e3779b9) >>> 0
  let z = state
  z = Math.imul(z ^ (z >>> 16), 0x21f0aaad)
  z = Math.imul(z ^ (z >>> 15), 0x735a2d97)
  return ((z ^ (z >>> 15)) >>> 0) / 4294967296
}

export type Init = (shape: Shape) => Float32Array

/** float32 values on a device, or the one that is used when none is named. */
export function firstValues(init: Init, shape: Shape, device: Device | undefined): Tensor {
  return Tensor.from(init(shape), { shape, ...(device && { device }) })
}

export const zeros: Init = (shape) => new Float32Array(sizeOf(shape))
export const ones: Init = (shape) => new Float32Array(sizeOf(shape)).fill(1)

export function uniform(bound: number): Init {
  return (shape) => {
    const values = new Float32Array(sizeOf(shape))
    for (let i = 0; i < values.length; i++) values[i] = (2 * random() - 1) * bound
    return values
  }
}

/** Kaiming uniform with the slope sqrt(5) that linear layers customarily have: U(-1 / sqrt(K), 1 / sqrt(K)). */
export function kaimingUniform(fanIn: number): Init {
  return uniform(fanIn > 0 ? 1 / Math.sqrt(fanIn) : 0)
}

/** Box-Muller. */
export function normal(deviation = 1): Init {
  return (shape) => {
    const values = new Float32Array(sizeOf(shape))
    for (let i = 0; i < values.length; i += 2) {
      const radius = Math.sqrt(-2 * Math.log(1 - random())) * deviation
      const angle = 2 * Math.PI * random()
      values[i] = radius * Math.cos(angle)
      if (i + 1 < values.length) values[i + 1] = radius * Math.sin(angle)
    }
    return values
  }
}
