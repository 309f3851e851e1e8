/** Rotary position embeddings as a module: the frequencies, and cos and sin of every position needed so far. */
import { Module } from '../nn/module.js'
import { Buffer } from '../nn/parameter.js'
import type { Device } from '../tensor/device.js'
import type { StepRounding } from '../nn/rounding.js'
import { add, concat, gatherRows, mul, rope, ropeTables, sub } from '../tensor/ops.js'
import { Tensor } from '../tensor/tensor.js'
import { keep, tidy } from '../tensor/tidy.js'
import type { RopeSpec } from './rope.js'

export interface Tables {
  cos: Tensor
  sin: Tensor
}

/** Tables only grow, by doubling; smaller ones stay for calls that have them until the module is disposed. */
export class RotaryEmbedding extends Module implements StepRounding {
  bnbExact = false
  /** float32 [rotated elements / 2]; the two buffers are those that transformers has, and counts. */
  inv_freq: Buffer
  original_inv_freq: Buffer
  readonly spec: RopeSpec
  readonly #made = new Map<Device, (Tables & { rows: number })[]>()

  constructor(spec: RopeSpec) {
    super()
    this.spec = spec
    const buffer = () => new Buffer([spec.inverseFrequencies.length], { dtype: 'float32', persistent: false })
    this.inv_freq = buffer()
    this.original_inv_freq = buffer()
  }

  override get dispatch(): 'anywhere' {
    return 'anywhere'
  }

  /** Tables for positions below `positions`. */
  tables(positions: number, device: Device): Tables {
    const made = this.#made.get(device) ?? []
    const last = made.at(-1)
    if (last && last.rows >= positions) return last
    for (const buffer of [this.inv_freq, this.original_inv_freq]) {
      if (buffer.isLoaded) continue
      buffer.replace(Tensor.from(this.spec.inverseFrequencies, { device: buffer.device ?? device }))
    }
    const rows = Math.max(256, 2 ** Math.ceil(Math.log2(positions)))
    const tables = tidy(() => {
      const { cos, sin } = ropeTables(this.inv_freq.value.to(device), rows, this.spec.scale)
      return { cos: keep(cos), sin: keep(sin), rows }
    })
    this.#made.set(device, [...made, tables])
    return tables
  }

  /** x [T, heads, D] rotated by the positions int32 [T], all below `maxPosition`. */
  forward(x: Tensor, positions: Tensor, maxPosition: number): Tensor {
    const { cos, sin } = this.tables(maxPosition, x.device)
    const { interleaved } = this.spec
    if (this.bnbExact && !interleaved) return this.#inSteps(x, { cos, sin }, positions)
    return rope(x, cos, sin, positions, interleaved)
  }

  /** The same with tables in x's dtype, products and sums rounded one by one. */
  #inSteps(x: Tensor, { cos, sin }: Tables, positions: Tensor): Tensor {
    return tidy(() => {
      const [tokens, , dim] = x.shape as [number, number, number]
      const half = cos.shape[1]!
      const [c, s] = [cos, sin].map((table) =>
        gatherRows(table, positions).to(x.dtype).reshape(tokens, 1, half),
      ) as [Tensor, Tensor]
      const [a, b] = [x.slice(2, 0, half), x.slice(2, half, 2 * half)]
      const parts = [sub(mul(a, c), mul(b, s)), add(mul(b, c), mul(a, s))]
      if (dim > 2 * half) parts.push(x.slice(2, 2 * half, dim))
      return concat(parts, 2)
    })
  }

  #free(): void {
    for (const { cos, sin } of [...this.#made.values()].flat()) {
      cos.dispose()
      sin.dispose()
    }
    this.#made.clear()
  }

  override ownMove(device: Device): void {
    super.ownMove(device)
    this.#free()
  }

  override ownDispose(): void {
    super.ownDispose()
    this.#free()
  }
}
