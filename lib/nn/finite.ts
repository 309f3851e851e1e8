/** NaN and infinite elements of weights: counted on the device, without making anybody wait for the answer. */
import { HalfbyteError } from '../errors.js'
import { countNonfinite } from '../tensor/ops.js'
import type { Tensor } from '../tensor/tensor.js'
import { keep } from '../tensor/tidy.js'
import type { Module } from './module.js'

export class FiniteCheck {
  #pending: Promise<number> = Promise.resolve(0)
  #bad = 0

  /** Starts over with these tensors: they are read before anything that is queued later. */
  begin(...tensors: Tensor[]): void {
    const counts = tensors.map((tensor) => keep(countNonfinite(tensor)))
    const read = Promise.all(counts.map((count) => count.item().finally(() => count.dispose())))
    this.#bad = 0
    const pending = read.then((numbers) => {
      const bad = numbers.reduce((a, b) => a + b, 0)
      if (this.#pending === pending) this.#bad = bad
      return bad
    })
    this.#pending = pending
    pending.catch(() => {}) // count() reports it
  }

  count(): Promise<number> {
    return this.#pending
  }

  /** Throws when the answer is there and bad. */
  refuse(layer: string): void {
    if (this.#bad === 0) return
    throw new HalfbyteError(
      'ERR_HALFBYTE_VALUE',
      `${layer}: the weight that was quantised has ${this.#bad} NaN or infinite elements; its product would be garbage`,
    )
  }
}

/** Module.checkFinite(). */
export async function checkFinite(model: Module): Promise<void> {
  const complaints: string[] = []
  for (const [path, module] of model.namedModules()) {
    const bad = await module.ownNonfinite()
    if (bad > 0) complaints.push(`${path || module.constructor.name} (${bad})`)
  }
  if (complaints.length > 0) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_VALUE',
      `NaN or infinity in the weights of ${complaints.join(', ')}: such blocks cannot be quantised. ` +
        'Repair the weights, or leave these modules unquantised with modulesToNotConvert',
    )
  }
}
