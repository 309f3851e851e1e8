/**
 * Mixtures of experts: a router sends each token to a few of many MLPs, and their results are added with its weights
 * (arXiv 2101.03961). Routing stays on the device: the weights are a matrix [T, experts] with zeros for the experts that a
 * token does not go to. Every expert computes all tokens, so that no size depends on the routing and a call can be
 * captured; the cost is that of all experts, whatever their number per token.
 */
import { ModuleList } from '../nn/containers.js'
import { FusedExperts, type ExpertActivation, type Experts } from '../nn/experts.js'
import { Linear } from '../nn/linear.js'
import { Module } from '../nn/module.js'
import type { Device } from '../tensor/device.js'
import {
  activation,
  add,
  argmax,
  div,
  gatherRows,
  linear,
  maximum,
  minimum,
  mul,
  sub,
} from '../tensor/ops.js'
import { Tensor } from '../tensor/tensor.js'
import { keep, tidy } from '../tensor/tidy.js'
import { GatedMlp } from './mlp.js'
import type { DecoderSpec, ExpertSpec } from './spec.js'

/** Farther apart than any two logits. */
const FAR = 1e30

/** Constants that routing needs on a device. */
class Routing {
  /** float32 [E, E] and [1, E]. */
  readonly identity: Tensor
  readonly ones: Tensor

  constructor(experts: number, device: Device) {
    const identity = Float32Array.from({ length: experts ** 2 }, (_, i) => (i % (experts + 1) === 0 ? 1 : 0))
    this.identity = keep(Tensor.from(identity, { shape: [experts, experts], device }))
    this.ones = keep(Tensor.full([1, experts], 1, 'float32', device))
  }

  /** Sums of the rows of x [T, E]: [T, 1]. */
  sum(x: Tensor): Tensor {
    return linear(x, this.ones)
  }

  /**
   * The `k` largest logits of each row: `chosen` has ones at their places, `weights` the softmax over all logits there,
   * or over the chosen ones with `normalize`. Both float32 [T, E]; of equal logits the first is the larger one.
   */
  choose(logits: Tensor, k: number, normalize: boolean): { chosen: Tensor; weights: Tensor } {
    return tidy(() => {
      let rest = logits
      let chosen: Tensor | undefined
      let largest: Tensor | undefined
      for (let i = 0; i < k; i++) {
        const one = gatherRows(this.identity, argmax(rest))
        largest ??= this.sum(mul(logits, one))
        chosen = chosen ? add(chosen, one) : one
        if (i + 1 < k) rest = sub(rest, mul(one, FAR))
      }
      const all = activation(sub(logits, largest!), 'exp')
      const kept = mul(all, chosen!)
      return { chosen: chosen!, weights: div(kept, this.sum(normalize ? kept : all)) }
    })
  }

  dispose(): void {
    this.identity.dispose()
    this.ones.dispose()
  }
}

/** Experts that are modules of their own. */
class ExpertList extends ModuleList<GatedMlp> implements Experts {
  run(expert: number, x: Tensor): Tensor {
    return this.at(expert)!.forward(x)
  }
}

/** act(gate) * (up + 1) of rows in which gate and up take turns, both limited (gpt-oss). */
export function clampedGlu(limit: number): ExpertActivation {
  return (gateUp) => {
    const [tokens, both] = gateUp.shape as [number, number]
    const pairs = gateUp.reshape(tokens, both / 2, 2)
    const half = (i: number) => pairs.slice(2, i, i + 1).reshape(tokens, both / 2)
    const gate = minimum(half(0), limit)
    const up = maximum(minimum(half(1), limit), -limit)
    return mul(mul(gate, activation(mul(gate, 1.702), 'sigmoid')), add(up, 1))
  }
}

export class SparseMlp extends Module {
  /** The router. */
  gate: Linear
  experts: Module & Experts
  readonly #spec: ExpertSpec
  #routing: Routing | undefined

  constructor(spec: DecoderSpec, experts: ExpertSpec) {
    super()
    this._names = spec.names
    this.#spec = experts
    const { count, intermediateSize, fused } = experts
    const { hiddenSize, mlpBias: bias } = spec
    this.gate = new Linear(hiddenSize, count, { bias: experts.routerBias })
    this.experts = fused
      ? new FusedExperts({ count, hiddenSize, intermediateSize, bias, activation: clampedGlu(fused.limit) })
      : new ExpertList(Array.from({ length: count }, () => new GatedMlp(spec, intermediateSize)))
  }

  /** `residual` is added to the result. */
  forward(x: Tensor, residual?: Tensor): Tensor {
    return tidy(() => {
      const { count, perToken, normalize } = this.#spec
      const { chosen, weights } = this.#router(x.device).choose(
        this.gate.forward(x).to('float32'),
        perToken,
        normalize,
      )
      const [taken, shares] = [chosen.to(x.dtype), weights.to(x.dtype)]
      let sum = residual
      for (let e = 0; e < count; e++) {
        sum = tidy(() => {
          // tokens of other experts go in as zeros: nothing that they would overflow to can reach the sum
          const y = this.experts.run(e, mul(x, taken.slice(1, e, e + 1)))
          const part = mul(y, shares.slice(1, e, e + 1))
          return sum ? add(sum, part) : part
        })
      }
      return sum!
    })
  }

  #router(device: Device): Routing {
    if (this.#routing && this.#routing.ones.device !== device) this.#free()
    return (this.#routing ??= new Routing(this.#spec.count, device))
  }

  #free(): void {
    this.#routing?.dispose()
    this.#routing = undefined
  }

  override ownDispose(): void {
    super.ownDispose()
    this.#free()
  }
}
