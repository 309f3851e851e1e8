/** The tensors that a blockwise quantised one is read with, besides its codes: in 4 bits and in 8. */
import type { Tensor } from '../tensor/tensor.js'
import { keep } from '../tensor/tidy.js'

/** The quantised statistics of a double-quantised tensor: absmax = code[codes] * absmax[block of 256] + offset. */
export interface NestedState {
  /** float32 [ceil(blocks / 256)]. */
  absmax: Tensor
  /** float32 [256], the signed dynamic map. */
  code: Tensor
  blocksize: number
  dtype: 'float32'
}

/** Owns its tensors: no tidy() frees them, dispose() does. */
export abstract class Statistics implements Disposable {
  /** float32 [ceil(n / blocksize)], or uint8 with state2 and offset. */
  readonly absmax: Tensor
  /** The values that the codes stand for: float32 [16] or [256]. */
  readonly code: Tensor
  /** float32 [1], the mean that was taken off the absmax. */
  readonly offset: Tensor | undefined
  /** The statistics of a quantised absmax. */
  readonly state2: NestedState | undefined

  constructor(parts: {
    absmax: Tensor
    code: Tensor
    offset?: Tensor | undefined
    state2?: NestedState | undefined
  }) {
    this.absmax = keep(parts.absmax)
    this.code = keep(parts.code)
    this.offset = parts.offset && keep(parts.offset)
    this.state2 = parts.state2
    if (parts.state2) {
      keep(parts.state2.absmax)
      keep(parts.state2.code)
    }
  }

  /** Whether the absmax is itself quantised. */
  get nested(): boolean {
    return this.state2 !== undefined
  }

  protected get tensors(): Tensor[] {
    const { absmax, code, offset, state2 } = this
    return [absmax, code, ...(offset ? [offset] : []), ...(state2 ? [state2.absmax, state2.code] : [])]
  }

  dispose(): void {
    for (const tensor of this.tensors) tensor.dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }
}
