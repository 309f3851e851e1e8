/**
 * Mixtures of experts: a router sends each token to a few of many MLPs, and their results are added with its weights
 * (arXiv 2101.03961). Routing stays on the device, and no size depends on it, so that a call can be captured: what a
 * token has chosen are ids and weights [T, k], and products that read the ids there make its k results, [T k, hidden].
 * Where there are no such products (ExpertLayers), and with gradients, the weights are a matrix [T, experts] with zeros
 * for the experts that a token does not go to, and every expert computes all tokens.
 */
import { ModuleList } from '../nn/containers.js'
import { FusedExperts, type ChosenExperts, type ExpertActivation, type Experts } from '../nn/experts.js'
import { Linear } from '../nn/linear.js'
import { zeros } from '../nn/init.js'
import { Module } from '../nn/module.js'
import { Buffer } from '../nn/parameter.js'
import type { StepRounding } from '../nn/rounding.js'
import { needsGrad } from '../tensor/autograd.js'
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
  routeTokens,
  sub,
  weightedSum,
} from '../tensor/ops.js'
import { Tensor } from '../tensor/tensor.js'
import { keep, tidy } from '../tensor/tidy.js'
import { GatedMlp } from './mlp.js'
import type { DecoderSpec, ExpertSpec, GroupRouting } from './spec.js'

/** Farther apart than any two logits. */
const FAR = 1e30
/** Keeps a sum of weights from being 0. */
const TINY = 1e-20

/** Marks the largest of n values, row by row, with ops that stay on the device. */
class Marker {
  /** float32 [n, n] and [1, n]. */
  readonly #identity: Tensor
  readonly #ones: Tensor

  constructor(n: number, device: Device) {
    const identity = Float32Array.from({ length: n ** 2 }, (_, i) => (i % (n + 1) === 0 ? 1 : 0))
    this.#identity = keep(Tensor.from(identity, { shape: [n, n], device }))
    this.#ones = keep(Tensor.full([1, n], 1, 'float32', device))
  }

  /** Sums of the rows of x [T, n]: [T, 1]. */
  sum(x: Tensor): Tensor {
    return linear(x, this.#ones)
  }

  /** Ones at the `k` largest values of each row of float32 [T, n]; of equal ones the first is the larger. */
  mark(values: Tensor, k: number): Tensor {
    return tidy(() => {
      let rest = values
      let marks: Tensor | undefined
      for (let i = 0; i < k; i++) {
        const one = gatherRows(this.#identity, argmax(rest))
        marks = marks ? add(marks, one) : one
        if (i + 1 < k) rest = sub(rest, mul(one, FAR))
      }
      return marks!
    })
  }

  dispose(): void {
    this.#identity.dispose()
    this.#ones.dispose()
  }
}

/** Which experts tokens go to, and with which weights: both float32 [T, experts], `chosen` of ones and zeros. */
interface Routes {
  chosen: Tensor
  weights: Tensor
}

/** What routing needs on a device. */
class Routing {
  readonly #spec: ExpertSpec
  readonly #device: Device
  #all: Marker | undefined
  /** Of the groups, and of the experts in one. */
  readonly #groups: Marker | undefined
  readonly #inGroup: Marker | undefined

  constructor(spec: ExpertSpec, device: Device) {
    this.#spec = spec
    this.#device = device
    const groups = spec.groupRouting?.groups ?? 1
    if (groups > 1) {
      this.#groups = new Marker(groups, device)
      this.#inGroup = new Marker(spec.count / groups, device)
    }
  }

  get #experts(): Marker {
    return (this.#all ??= new Marker(this.#spec.count, this.#device))
  }

  /** Ids int32 and weights float32 [T, perToken] from logits float32 [T, experts]; `bias` as choose() has it. */
  route(logits: Tensor, bias: Tensor | undefined): { ids: Tensor; weights: Tensor } {
    const { perToken, normalize, groupRouting } = this.#spec
    return tidy(() => {
      if (!groupRouting) return routeTokens(logits, { perToken, normalize, softmax: true })
      const scores = activation(logits, 'sigmoid')
      const choice = this.#choice(scores, bias, groupRouting)
      return routeTokens(scores, { perToken, choice, normalize, tiny: TINY, scale: groupRouting.scale })
    })
  }

  /** From logits float32 [T, experts]; `bias` is added to the sigmoids for the choice. */
  choose(logits: Tensor, bias: Tensor | undefined): Routes {
    const { perToken, normalize, groupRouting } = this.#spec
    return tidy(() => {
      if (groupRouting) return this.#chooseInGroups(logits, bias, groupRouting)
      const chosen = this.#experts.mark(logits, perToken)
      const first = this.#experts.mark(logits, 1)
      const all = activation(sub(logits, this.#experts.sum(mul(logits, first))), 'exp')
      const kept = mul(all, chosen)
      return { chosen, weights: div(kept, this.#experts.sum(normalize ? kept : all)) }
    })
  }

  #chooseInGroups(logits: Tensor, bias: Tensor | undefined, routing: GroupRouting): Routes {
    const { perToken, normalize } = this.#spec
    const scores = activation(logits, 'sigmoid')
    const chosen = this.#experts.mark(this.#choice(scores, bias, routing), perToken)
    const kept = mul(scores, chosen)
    const weights = normalize ? div(kept, add(this.#experts.sum(kept), TINY)) : kept
    return { chosen, weights: mul(weights, routing.scale) }
  }

  /** What experts are chosen by: the scores and their bias, 0 outside of the best groups. */
  #choice(scores: Tensor, bias: Tensor | undefined, { groups, chosenGroups }: GroupRouting): Tensor {
    const { count } = this.#spec
    const tokens = scores.shape[0]!
    const choice = bias ? add(scores, bias) : scores
    if (!this.#groups || !this.#inGroup) return choice
    // a group is as good as its two best experts
    const each = choice.reshape(tokens * groups, count / groups)
    const best = this.#inGroup.sum(mul(each, this.#inGroup.mark(each, 2))).reshape(tokens, groups)
    const open = this.#groups.mark(best, chosenGroups).reshape(tokens * groups, 1)
    return mul(each, open).reshape(tokens, count)
  }

  dispose(): void {
    for (const marker of [this.#all, this.#groups, this.#inGroup]) marker?.dispose()
  }
}

/** A router that is corrected, for the choice alone, by a bias that training balances the experts with. */
class BiasedRouter extends Linear {
  e_score_correction_bias: Buffer

  constructor(hiddenSize: number, experts: number) {
    super(hiddenSize, experts, { bias: false })
    this.e_score_correction_bias = new Buffer([experts], { dtype: 'float32', init: zeros })
  }

  /** In float32, whatever the dtype of x. */
  override forward(x: Tensor): Tensor {
    return tidy(() => super.forward(x.to('float32')))
  }
}

/** Experts that are modules of their own. */
class ExpertList extends ModuleList<GatedMlp> implements Experts {
  run(expert: number, x: Tensor): Tensor {
    return this.at(expert)!.forward(x)
  }

  chosen(x: Tensor, pairs: number): ChosenExperts | undefined {
    return GatedMlp.chosen([...this], x, pairs)
  }
}

/** act(gate) * (up + 1) of rows in which gate and up take turns, both limited (gpt-oss). */
function clampedGlu(limit: number): ExpertActivation {
  return (gateUp) => {
    const [tokens, both] = gateUp.shape as [number, number]
    const pairs = gateUp.reshape(tokens, both / 2, 2)
    const half = (i: number) => pairs.slice(2, i, i + 1).reshape(tokens, both / 2)
    const gate = minimum(half(0), limit)
    const up = maximum(minimum(half(1), limit), -limit)
    return mul(mul(gate, activation(mul(gate, 1.702), 'sigmoid')), add(up, 1))
  }
}

export class SparseMlp extends Module implements StepRounding {
  bnbExact = false
  /** The router. */
  gate: Linear
  experts: Module & Experts
  /** What every token takes besides. */
  shared_experts?: GatedMlp
  readonly #spec: ExpertSpec
  readonly #routings = new Map<Device, Routing>()

  constructor(spec: DecoderSpec, experts: ExpertSpec) {
    super()
    this._names = spec.names
    this.#spec = experts
    const { count, intermediateSize, fused } = experts
    const { hiddenSize, mlpBias: bias } = spec
    this.gate = experts.groupRouting
      ? new BiasedRouter(hiddenSize, count)
      : new Linear(hiddenSize, count, { bias: experts.routerBias })
    this.experts = fused
      ? new FusedExperts({ count, hiddenSize, intermediateSize, bias, activation: clampedGlu(fused.limit) })
      : new ExpertList(Array.from({ length: count }, () => new GatedMlp(spec, intermediateSize)))
    if (experts.sharedSize > 0) this.shared_experts = new GatedMlp(spec, experts.sharedSize)
  }

  /** `residual` is added to the result. */
  forward(x: Tensor, residual?: Tensor): Tensor {
    return tidy(() => {
      const bias =
        this.gate instanceof BiasedRouter ? this.gate.e_score_correction_bias.value.to(x.device) : undefined
      const logits = this.gate.forward(x).to('float32')
      const router = this.#router(x.device)
      const first = this.shared_experts ? this.shared_experts.forward(x, residual) : residual
      const pairs = x.shape[0]! * this.#spec.perToken
      const chosen = needsGrad(x, logits, first) ? undefined : this.experts.chosen(x, pairs)
      // what is added to the sum: afterwards where it is to be rounded before
      const [added, after] = this.bnbExact ? [undefined, first] : [first, undefined]
      let sum: Tensor
      if (chosen) {
        const { ids, weights } = router.route(logits, bias)
        sum = weightedSum(chosen(ids), weights, added)
      } else {
        const { chosen: marks, weights } = router.choose(logits, bias)
        sum = this.#sum(x, marks, this.bnbExact ? weights : weights.to(x.dtype), added).to(x.dtype)
      }
      return after ? add(after, sum) : sum
    })
  }

  /** The experts' results times their weights [T, experts], added to `sum`, in the dtype of the weights. */
  #sum(x: Tensor, chosen: Tensor, weights: Tensor, sum?: Tensor): Tensor {
    const taken = chosen.to(x.dtype)
    for (let e = 0; e < this.#spec.count; e++) {
      sum = tidy(() => {
        // tokens of other experts go in as zeros: nothing that they would overflow to can reach the sum
        const y = this.experts.run(e, mul(x, taken.slice(1, e, e + 1)))
        const part = mul(y.to({ device: x.device, dtype: weights.dtype }), weights.slice(1, e, e + 1))
        return sum ? add(sum, part) : part
      })
    }
    return sum!
  }

  #router(device: Device): Routing {
    let routing = this.#routings.get(device)
    if (!routing) this.#routings.set(device, (routing = new Routing(this.#spec, device)))
    return routing
  }

  override ownDispose(): void {
    super.ownDispose()
    for (const routing of this.#routings.values()) routing.dispose()
    this.#routings.clear()
  }
}
