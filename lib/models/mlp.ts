/** The feed-forward part of a layer: x is [T, hidden]. */
import { ExpertLayers } from '../nn/expert_layers.js'
import type { ChosenExperts } from '../nn/experts.js'
import { runsInPlace } from '../nn/hooks.js'
import { Conv1D, Linear } from '../nn/linear.js'
import { Linear4bit } from '../nn/linear4bit.js'
import { Module } from '../nn/module.js'
import type { StepRounding } from '../nn/rounding.js'
import { activation, add, gatedActivation, mul, type Activation } from '../tensor/ops.js'
import type { Tensor } from '../tensor/tensor.js'
import { tidy } from '../tensor/tidy.js'
import type { DecoderSpec } from './spec.js'

/** The tanh form of GELU as transformers' gelu_new computes it: every operation rounds to x's dtype. */
function geluInSteps(x: Tensor): Tensor {
  return tidy(() => {
    // factors are not rounded, only their products
    const times = (t: Tensor, factor: number) => mul(t.to('float32'), factor).to(x.dtype)
    const cubic = times(mul(mul(x, x), x), 0.044715)
    const bent = activation(times(add(x, cubic), Math.sqrt(2 / Math.PI)), 'tanh')
    return mul(times(x, 0.5), add(bent, 1))
  })
}

/** act(gate(x)) * up(x), and down from there. */
export class GatedMlp extends Module implements StepRounding {
  bnbExact = false
  gate_proj?: Linear
  up_proj?: Linear
  gate_up_proj?: Linear
  down_proj: Linear
  readonly #activation: Activation

  constructor(spec: DecoderSpec, intermediateSize = spec.intermediateSize) {
    super()
    this._names = spec.names
    const { hiddenSize, mlpBias: bias } = spec
    if (spec.mlp === 'gated in one') {
      this.gate_up_proj = new Linear(hiddenSize, 2 * intermediateSize, { bias })
    } else {
      this.gate_proj = new Linear(hiddenSize, intermediateSize, { bias })
      this.up_proj = new Linear(hiddenSize, intermediateSize, { bias })
    }
    this.down_proj = new Linear(intermediateSize, hiddenSize, { bias })
    this.#activation = spec.activation
  }

  #inner(x: Tensor): Tensor {
    const act = this.#activation
    if (!this.gate_up_proj) {
      const [gate, up] = [this.gate_proj!, this.up_proj!]
      if (!this.bnbExact) return Linear4bit.forwardGated(x, gate, up, act)
      return mul(activation(gate.forward(x), act), up.forward(x))
    }
    const both = this.gate_up_proj.forward(x)
    const half = both.shape[1]! / 2
    const [gate, up] = [both.slice(1, 0, half), both.slice(1, half, 2 * half)]
    return this.bnbExact ? mul(activation(gate, act), up) : gatedActivation(gate, up, act)
  }

  /** `residual` is added to the result. */
  forward(x: Tensor, residual?: Tensor): Tensor {
    return this.down_proj.forward(this.#inner(x), residual)
  }

  /** forward() of many such MLPs for the tokens that go to each; see Experts.chosen(). */
  static chosen(mlps: readonly GatedMlp[], x: Tensor, pairs: number): ChosenExperts | undefined {
    const alike = mlps.every((mlp) => {
      const own = Object.getPrototypeOf(mlp) as GatedMlp
      return own.forward === GatedMlp.prototype.forward && runsInPlace(mlp, x.device)
    })
    if (!alike || new Set(mlps.map((mlp) => mlp.bnbExact)).size !== 1) return undefined
    const layers = (name: 'gate_proj' | 'up_proj' | 'down_proj') => {
      const all = mlps.map((mlp) => mlp[name])
      return all.every((layer) => layer !== undefined) ? ExpertLayers.of(all, x, pairs) : undefined
    }
    const [gate, up, down] = [layers('gate_proj'), layers('up_proj'), layers('down_proj')]
    const { bnbExact } = mlps[0]!
    const act = mlps[0]!.#activation
    if (!gate || !up || !down) return undefined
    return (ids) =>
      tidy(() => {
        const inner = bnbExact
          ? mul(activation(gate.forward(x, ids), act), up.forward(x, ids))
          : ExpertLayers.forwardGated(x, ids, gate, up, act)
        return down.forward(inner, ids)
      })
  }
}

/** down(act(up(x))). */
export class PlainMlp extends Module implements StepRounding {
  bnbExact = false
  up_proj: Linear
  down_proj: Linear
  readonly #activation: Activation
  readonly #inSteps: boolean

  constructor(spec: DecoderSpec) {
    super()
    this._names = spec.names
    const { hiddenSize, intermediateSize, mlpBias: bias } = spec
    const Layer = spec.transposed ? Conv1D : Linear
    this.up_proj = new Layer(hiddenSize, intermediateSize, { bias })
    this.down_proj = new Layer(intermediateSize, hiddenSize, { bias })
    this.#activation = spec.activation
    this.#inSteps = spec.rounding.activationInSteps ?? false
  }

  /** `residual` is added to the result. */
  forward(x: Tensor, residual?: Tensor): Tensor {
    const up = this.up_proj.forward(x)
    const inner = this.bnbExact && this.#inSteps ? geluInSteps(up) : activation(up, this.#activation)
    return this.down_proj.forward(inner, residual)
  }
}
