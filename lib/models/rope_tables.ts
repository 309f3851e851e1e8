/** cos and sin of every position that a model has needed so far, on its device. */
import type { Device } from '../tensor/device.js'
import { ropeTables } from '../tensor/ops.js'
import { Tensor } from '../tensor/tensor.js'
import { keep } from '../tensor/tidy.js'
import type { RopeSpec } from './rope.js'

export interface Tables {
  cos: Tensor
  sin: Tensor
}

/** Tables only grow, by doubling; smaller ones stay for calls that have them until the model is disposed. */
export class RopeTables {
  readonly #made = new Map<RopeSpec, (Tables & { rows: number })[]>()

  get(spec: RopeSpec, positions: number, device: Device): Tables {
    const made = this.#made.get(spec) ?? []
    const last = made.at(-1)
    if (last && last.rows >= positions && last.cos.device === device) return last
    const rows = Math.max(256, 2 ** Math.ceil(Math.log2(positions)))
    const frequencies = Tensor.from(spec.inverseFrequencies, { device })
    const { cos, sin } = ropeTables(frequencies, rows, spec.scale)
    frequencies.dispose()
    const tables = { cos: keep(cos), sin: keep(sin), rows }
    this.#made.set(spec, [...made, tables])
    return tables
  }

  dispose(): void {
    for (const made of this.#made.values()) {
      for (const { cos, sin } of made) {
        cos.dispose()
        sin.dispose()
      }
    }
    this.#made.clear()
  }
}
