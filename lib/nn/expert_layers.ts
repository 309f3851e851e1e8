/** Linear layers of many experts as one product, in which only the experts that tokens have chosen compute. */
import { needsGrad } from '../tensor/autograd.js'
import type { DType } from '../tensor/dtype.js'
import {
  expertWeights,
  gatedActivation,
  linearExperts,
  linearExpertsGated,
  takesExperts,
  type Activation,
  type ExpertWeight,
  type ExpertWeights,
} from '../tensor/ops.js'
import type { Tensor } from '../tensor/tensor.js'
import { tidy } from '../tensor/tidy.js'
import { runsInPlace, streamsInPlace } from './hooks.js'
import { Linear } from './linear.js'
import { Linear4bit } from './linear4bit.js'
import { Linear8bit } from './linear8bit.js'

/** Whether forward() is nothing but the product with the layer's own weight, where x is. */
function isProduct(layer: Linear, x: Tensor, rows: number): boolean {
  const own = Object.getPrototypeOf(layer) as Linear
  if (![Linear, Linear4bit, Linear8bit].some((kind) => kind.prototype.forward === own.forward)) return false
  return runsInPlace(layer, x.device) || streamsInPlace(layer, x, rows)
}

export class ExpertLayers {
  readonly #weights: ExpertWeights
  /** What x is multiplied in. */
  readonly #dtype: DType

  private constructor(weights: ExpertWeights, dtype: DType) {
    this.#weights = weights
    this.#dtype = dtype
  }

  /**
   * The layers for the product of x, or of something of its dtype and device, in so many pairs of a token and an expert.
   * undefined where each is to be called for all tokens: when they differ, are on other devices, have a forward() of
   * their own or a gradient, or the device has no such product for them.
   */
  static of(layers: readonly Linear[], x: Tensor, pairs: number): ExpertLayers | undefined {
    const rows = pairs / layers.length
    if (!layers.every((layer) => isProduct(layer, x, rows))) return undefined
    const dtypes = new Set(
      layers.map((layer) => (layer instanceof Linear4bit ? layer.computeDtypeFor(x) : x.dtype)),
    )
    const weights = layers.map((layer) => layer.expertWeight())
    return dtypes.size === 1 ? this.ofWeights(weights, x, pairs, [...dtypes][0]) : undefined
  }

  /** The same from weights; in x's dtype unless another is given. */
  static ofWeights(
    weights: readonly (ExpertWeight | undefined)[],
    x: Tensor,
    pairs: number,
    dtype = x.dtype,
  ): ExpertLayers | undefined {
    if (!weights.every((weight) => weight !== undefined)) return undefined
    const all = expertWeights(weights)
    if (all?.device !== x.device || needsGrad(x, ...all.operands)) return undefined
    return takesExperts(all, dtype, pairs) ? new this(all, dtype) : undefined
  }

  /** Results of the experts that `ids` name, one row for each; see linearExperts(). */
  forward(x: Tensor, ids: Tensor): Tensor {
    return tidy(() => linearExperts(x.to(this.#dtype), ids, this.#weights).to(x.dtype))
  }

  /** activation(gate.forward(x, ids)) * up.forward(x, ids). */
  static forwardGated(
    x: Tensor,
    ids: Tensor,
    gate: ExpertLayers,
    up: ExpertLayers,
    activation: Activation,
  ): Tensor {
    const [first, second] = [gate.#weights, up.#weights]
    const same = first.scalars.every((value, i) => value === second.scalars[i])
    if (same && gate.#dtype === x.dtype && up.#dtype === x.dtype)
      return linearExpertsGated(x, ids, first, second, activation)
    return tidy(() => gatedActivation(gate.forward(x, ids), up.forward(x, ids), activation))
  }
}
