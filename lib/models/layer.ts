/** A layer of a decoder: attention, then an MLP, each added to the stream; or both from the same input. */
import { Linear } from '../nn/linear.js'
import { Module } from '../nn/module.js'
import type { StepRounding } from '../nn/rounding.js'
import { activation, add, mul, type Activation } from '../tensor/ops.js'
import type { Tensor } from '../tensor/tensor.js'
import { tidy } from '../tensor/tidy.js'
import { Attention, type ForwardContext } from './attention.js'
import { SparseMlp } from './experts.js'
import { LatentAttention } from './latent_attention.js'
import { GatedMlp, PlainMlp } from './mlp.js'
import { makeNorm, type Norm } from './norm.js'
import type { DecoderSpec } from './spec.js'

type Mlp = GatedMlp | PlainMlp | SparseMlp

function makeMlp(spec: DecoderSpec, index: number): Mlp {
  if (spec.experts?.layers[index]) return new SparseMlp(spec, spec.experts)
  return spec.mlp === 'plain' ? new PlainMlp(spec) : new GatedMlp(spec)
}

function makeAttention(spec: DecoderSpec, index: number): Attention | LatentAttention {
  const { latentAttention } = spec
  return latentAttention ? new LatentAttention(spec, latentAttention, index) : new Attention(spec, index)
}

export class DecoderLayer extends Module {
  self_attn: Attention | LatentAttention
  mlp: Mlp
  input_layernorm?: Norm
  post_attention_layernorm: Norm
  pre_feedforward_layernorm?: Norm
  post_feedforward_layernorm?: Norm
  readonly #spec: DecoderSpec

  constructor(spec: DecoderSpec, index: number) {
    super()
    this._names = spec.names
    this.#spec = spec
    this.self_attn = makeAttention(spec, index)
    this.mlp = makeMlp(spec, index)
    if (spec.norms !== 'output') this.input_layernorm = makeNorm(spec)
    this.post_attention_layernorm = makeNorm(spec)
    if (spec.norms === 'both') this.pre_feedforward_layernorm = makeNorm(spec)
    if (spec.norms !== 'input') this.post_feedforward_layernorm = makeNorm(spec)
  }

  forward(x: Tensor, context: ForwardContext): Tensor {
    return tidy(() => {
      const { norms } = this.#spec
      const input = this.input_layernorm ? this.input_layernorm.forward(x) : x
      const attend = (residual?: Tensor) => this.self_attn.forward(input, context, residual)
      if (norms === 'input') {
        const h = this.#add(x, attend)
        const normed = this.post_attention_layernorm.forward(h)
        return this.#add(h, (residual) => this.mlp.forward(normed, residual))
      }
      const h = this.#add(x, () => this.post_attention_layernorm.forward(attend()))
      const normed = this.pre_feedforward_layernorm ? this.pre_feedforward_layernorm.forward(h) : h
      return this.#add(h, () => this.post_feedforward_layernorm!.forward(this.mlp.forward(normed)))
    })
  }

  /** x + f(): `f` may add x itself, in the pass that makes its result. */
  #add(x: Tensor, f: (residual?: Tensor) => Tensor): Tensor {
    const { norms, residualScale } = this.#spec
    if (norms === 'input' && residualScale === 1) return f(x)
    const y = f()
    return add(x, residualScale === 1 ? y : mul(y, residualScale))
  }
}

/** x + attention(norm(x)) + mlp(norm(x)), the norms being one or two. */
export class ParallelLayer extends Module implements StepRounding {
  bnbExact = false
  self_attn: Attention
  mlp: Mlp
  input_layernorm: Norm
  post_attention_layernorm?: Norm
  readonly #inputLast: boolean

  constructor(spec: DecoderSpec, index: number) {
    super()
    this._names = spec.names
    this.#inputLast = spec.rounding.inputLast ?? false
    this.self_attn = new Attention(spec, index)
    this.mlp = makeMlp(spec, index)
    this.input_layernorm = makeNorm(spec)
    if (spec.parallel === 'two norms') this.post_attention_layernorm = makeNorm(spec)
  }

  forward(x: Tensor, context: ForwardContext): Tensor {
    return tidy(() => {
      const normed = this.input_layernorm.forward(x)
      const other = this.post_attention_layernorm ? this.post_attention_layernorm.forward(x) : normed
      if (this.bnbExact && this.#inputLast)
        return add(this.mlp.forward(other, this.self_attn.forward(normed, context)), x)
      return this.mlp.forward(other, this.self_attn.forward(normed, context, x))
    })
  }
}

/** As DecoderLayer with norms on the inputs, its plain MLP being two linear layers of its own. */
export class FlatLayer extends Module {
  self_attn: Attention
  input_layernorm: Norm
  up_proj: Linear
  down_proj: Linear
  post_attention_layernorm: Norm
  readonly #activation: Activation

  constructor(spec: DecoderSpec, index: number) {
    super()
    this._names = spec.names
    const { hiddenSize, intermediateSize, mlpBias: bias } = spec
    this.self_attn = new Attention(spec, index)
    this.input_layernorm = makeNorm(spec)
    this.up_proj = new Linear(hiddenSize, intermediateSize, { bias })
    this.down_proj = new Linear(intermediateSize, hiddenSize, { bias })
    this.post_attention_layernorm = makeNorm(spec)
    this.#activation = spec.activation
  }

  forward(x: Tensor, context: ForwardContext): Tensor {
    return tidy(() => {
      const h = this.self_attn.forward(this.input_layernorm.forward(x), context, x)
      const up = this.up_proj.forward(this.post_attention_layernorm.forward(h))
      return this.down_proj.forward(activation(up, this.#activation), h)
    })
  }
}

export type Layer = DecoderLayer | ParallelLayer | FlatLayer

export function makeLayer(spec: DecoderSpec, index: number): Layer {
  if (spec.mlp === 'flat') return new FlatLayer(spec, index)
  return spec.parallel === 'no' ? new DecoderLayer(spec, index) : new ParallelLayer(spec, index)
}
