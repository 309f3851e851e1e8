/** The feed-forward part of a layer: x is [T, hidden]. */
import { Conv1D, Linear } from '../nn/linear.js'
import { Linear4bit } from '../nn/linear4bit.js'
import { Module } from '../nn/module.js'
import { activation, gatedActivation, type Activation } from '../tensor/ops.js'
import type { Tensor } from '../tensor/tensor.js'
import type { DecoderSpec } from './spec.js'

/** act(gate(x)) * up(x), and down from there. */
export class GatedMlp extends Module {
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
    if (!this.gate_up_proj)
      return Linear4bit.forwardGated(x, this.gate_proj!, this.up_proj!, this.#activation)
    const both = this.gate_up_proj.forward(x)
    const half = both.shape[1]! / 2
    return gatedActivation(both.slice(1, 0, half), both.slice(1, half, 2 * half), this.#activation)
  }

  /** `residual` is added to the result. */
  forward(x: Tensor, residual?: Tensor): Tensor {
    return this.down_proj.forward(this.#inner(x), residual)
  }
}

/** down(act(up(x))). */
export class PlainMlp extends Module {
  up_proj: Linear
  down_proj: Linear
  readonly #activation: Activation

  constructor(spec: DecoderSpec) {
    super()
    this._names = spec.names
    const { hiddenSize, intermediateSize, mlpBias: bias } = spec
    const Layer = spec.transposed ? Conv1D : Linear
    this.up_proj = new Layer(hiddenSize, intermediateSize, { bias })
    this.down_proj = new Layer(intermediateSize, hiddenSize, { bias })
    this.#activation = spec.activation
  }

  /** `residual` is added to the result. */
  forward(x: Tensor, residual?: Tensor): Tensor {
    return this.down_proj.forward(activation(this.up_proj.forward(x), this.#activation), residual)
  }
}
