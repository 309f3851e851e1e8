/** Attention with linear biases (arXiv 2108.12409): the slope of each head. */
import type { Device } from '../tensor/device.js'
import { Module } from '../nn/module.js'
import { Tensor } from '../tensor/tensor.js'
import { keep } from '../tensor/tidy.js'

/**
 * For 2^n heads the powers 1, 2, ... of 2^(-8 / 2^n). Other counts take those of the next lower power of two, and the odd
 * powers of the next higher one for the rest.
 */
export function alibiSlopes(heads: number): Float32Array {
  const lower = 2 ** Math.floor(Math.log2(heads))
  return Float32Array.from({ length: heads }, (_, i) =>
    i < lower ? 2 ** ((-8 * (i + 1)) / lower) : 2 ** ((-4 * (2 * (i - lower) + 1)) / lower),
  )
}

/** Keeps the slopes on each device. They follow from the config: no state, and not counted as memory of the model. */
export class Alibi extends Module {
  readonly heads: number
  readonly #slopes = new Map<Device, Tensor>()

  constructor(heads: number) {
    super()
    this.heads = heads
  }

  /** float32 [heads]. */
  forward(device: Device): Tensor {
    let slopes = this.#slopes.get(device)
    if (!slopes) {
      slopes = keep(Tensor.from(alibiSlopes(this.heads), { device }))
      this.#slopes.set(device, slopes)
    }
    return slopes
  }

  override ownDispose(): void {
    super.ownDispose()
    for (const slopes of this.#slopes.values()) slopes.dispose()
    this.#slopes.clear()
  }
}
