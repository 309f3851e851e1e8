/**
 * The blocks of decoder-only transformers, once for all families: attention, gated MLP, layer, stack. Properties have
 * the names of the checkpoint. Everything runs on a packed ragged batch over a paged cache; x is [T, hidden].
 */
import type { PagedKvCache } from '../generation/cache.js'
import { Embedding } from '../nn/embedding.js'
import { ModuleList } from '../nn/containers.js'
import { Linear } from '../nn/linear.js'
import { Linear4bit } from '../nn/linear4bit.js'
import { Module } from '../nn/module.js'
import { Buffer } from '../nn/parameter.js'
import { RMSNorm } from '../nn/norms.js'
import type { Device } from '../tensor/device.js'
import {
  add,
  gatedActivation,
  mul,
  pagedAttention,
  pagedWrite,
  raggedPositions,
  type Activation,
  type RaggedBatch,
} from '../tensor/ops.js'
import { Tensor } from '../tensor/tensor.js'
import { tidy } from '../tensor/tidy.js'
import { RotaryEmbedding } from './rotary.js'
import type { DecoderSpec, LayerSpec } from './spec.js'

/** Where a call's tokens stand and where their keys and values go. */
export interface ForwardContext {
  batch: RaggedBatch
  /** int32 [T]. */
  positions: Tensor
  cache: PagedKvCache
  /** Rotates x [T, heads, D] as the layer wants it. */
  rotate(x: Tensor, layer: LayerSpec): Tensor
}

export class Attention extends Module {
  readonly index: number
  q_proj?: Linear
  k_proj?: Linear
  v_proj?: Linear
  qkv_proj?: Linear
  o_proj: Linear
  q_norm?: RMSNorm
  k_norm?: RMSNorm
  readonly #spec: DecoderSpec

  constructor(spec: DecoderSpec, index: number) {
    super()
    this.#spec = spec
    this.index = index
    const { hiddenSize, numHeads, numKeyValueHeads, headDim } = spec
    const [queries, keys] = [numHeads * headDim, numKeyValueHeads * headDim]
    if (spec.fusedProjections) {
      this.qkv_proj = new Linear(hiddenSize, queries + 2 * keys, { bias: spec.qkvBias })
    } else {
      this.q_proj = new Linear(hiddenSize, queries, { bias: spec.qkvBias })
      this.k_proj = new Linear(hiddenSize, keys, { bias: spec.qkvBias })
      this.v_proj = new Linear(hiddenSize, keys, { bias: spec.qkvBias })
    }
    this.o_proj = new Linear(queries, hiddenSize, { bias: spec.outputBias })
    if (spec.queryKeyNorm !== 'none') {
      const options = { eps: spec.normEps, weightOffset: spec.normWeightOffset }
      const all = spec.queryKeyNorm === 'all'
      this.q_norm = new RMSNorm(all ? queries : headDim, options)
      this.k_norm = new RMSNorm(all ? keys : headDim, options)
    }
  }

  /** Queries [T, H, D], keys and values [T, KV, D], before rotation. */
  #project(x: Tensor): [Tensor, Tensor, Tensor] {
    const { numHeads, numKeyValueHeads, headDim, queryKeyNorm } = this.#spec
    const tokens = x.shape[0]!
    const counts = [numHeads, numKeyValueHeads, numKeyValueHeads]
    if (this.qkv_proj) {
      // heads of one product, told apart by their place in a row
      const all = this.qkv_proj.forward(x).reshape(tokens, numHeads + 2 * numKeyValueHeads, headDim)
      let at = 0
      return counts.map((n) => all.slice(1, at, (at += n))) as [Tensor, Tensor, Tensor]
    }
    const parts = Linear4bit.forwardGroup(x, [this.q_proj!, this.k_proj!, this.v_proj!])
    if (queryKeyNorm === 'all') {
      parts[0] = this.q_norm!.forward(parts[0]!)
      parts[1] = this.k_norm!.forward(parts[1]!)
    }
    const heads = parts.map((part, i) => part.reshape(tokens, counts[i]!, headDim))
    if (queryKeyNorm === 'head') {
      heads[0] = this.q_norm!.forward(heads[0]!)
      heads[1] = this.k_norm!.forward(heads[1]!)
    }
    return heads as [Tensor, Tensor, Tensor]
  }

  /** `residual` is added to the result. */
  forward(x: Tensor, context: ForwardContext, residual?: Tensor): Tensor {
    const spec = this.#spec
    const layer = spec.layers[this.index]!
    const { batch, cache } = context
    const [keys, values] = [cache.keys[this.index]!, cache.values[this.index]!]
    const [queries, plainKeys, v] = this.#project(x)
    const [q, k] = [context.rotate(queries, layer), context.rotate(plainKeys, layer)]
    pagedWrite(keys, values, k, v, batch)
    const y = pagedAttention(q, keys, values, batch, {
      scale: spec.attentionScale,
      softcap: spec.attentionSoftcap,
      window: layer.window,
    })
    return this.o_proj.forward(y.reshape(x.shape[0]!, spec.numHeads * spec.headDim), residual)
  }
}

/** act(gate(x)) * up(x), and down from there. */
export class GatedMlp extends Module {
  gate_proj?: Linear
  up_proj?: Linear
  gate_up_proj?: Linear
  down_proj: Linear
  readonly #activation: Activation

  constructor(spec: DecoderSpec) {
    super()
    const { hiddenSize, intermediateSize, mlpBias: bias } = spec
    if (spec.fusedProjections) {
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

export class DecoderLayer extends Module {
  self_attn: Attention
  mlp: GatedMlp
  input_layernorm?: RMSNorm
  post_attention_layernorm: RMSNorm
  pre_feedforward_layernorm?: RMSNorm
  post_feedforward_layernorm?: RMSNorm
  readonly #spec: DecoderSpec

  constructor(spec: DecoderSpec, index: number) {
    super()
    this.#spec = spec
    this.self_attn = new Attention(spec, index)
    this.mlp = new GatedMlp(spec)
    const norm = () => new RMSNorm(spec.hiddenSize, { eps: spec.normEps, weightOffset: spec.normWeightOffset })
    if (spec.norms !== 'output') this.input_layernorm = norm()
    this.post_attention_layernorm = norm()
    if (spec.norms === 'both') this.pre_feedforward_layernorm = norm()
    if (spec.norms !== 'input') this.post_feedforward_layernorm = norm()
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

/** An embedding that is scaled, by a buffer of its own. */
class ScaledEmbedding extends Embedding {
  embed_scale = new Buffer([], { dtype: 'float32', persistent: false })
}

export class Decoder extends Module {
  embed_tokens: Embedding
  layers: ModuleList<DecoderLayer>
  norm: RMSNorm
  /** One for each kind of position embedding that layers have. */
  rotary_emb: RotaryEmbedding[]
  readonly #spec: DecoderSpec

  constructor(spec: DecoderSpec) {
    super()
    this.#spec = spec
    const Table = spec.embeddingScaleBuffer ? ScaledEmbedding : Embedding
    this.embed_tokens = new Table(spec.vocabSize, spec.hiddenSize)
    this.layers = new ModuleList(spec.layers.map((_, i) => new DecoderLayer(spec, i)))
    this.norm = new RMSNorm(spec.hiddenSize, { eps: spec.normEps, weightOffset: spec.normWeightOffset })
    this.rotary_emb = spec.ropes.map((rope) => new RotaryEmbedding(rope))
  }

  /** Makes what calls with positions below `maxPosition` need, so that none of it falls into a capture. */
  prepare(maxPosition: number, device: Device): void {
    for (const rotary of this.rotary_emb) rotary.tables(maxPosition, device)
    if (this.embed_tokens instanceof ScaledEmbedding && !this.embed_tokens.embed_scale.isLoaded) {
      this.embed_tokens.embed_scale.replace(Tensor.full([], this.#spec.embeddingScale, 'float32', device))
    }
  }

  /** The context of a call. `maxPosition`: no token of the batch, now or in a replay, has this position or a later one. */
  context(batch: RaggedBatch, tokens: number, cache: PagedKvCache, maxPosition: number): ForwardContext {
    const positions = raggedPositions(batch, tokens)
    return {
      batch,
      cache,
      positions,
      rotate: (x, { rope }) =>
        rope ? this.rotary_emb[this.#spec.ropes.indexOf(rope)]!.forward(x, positions, maxPosition) : x,
    }
  }

  /** Hidden states [T, hidden] of tokens int32 [T] after the last norm, or after the first `count` layers. */
  forward(
    tokens: Tensor,
    batch: RaggedBatch,
    cache: PagedKvCache,
    maxPosition: number,
    count?: number,
  ): Tensor {
    return tidy(() => {
      const context = this.context(batch, tokens.size, cache, maxPosition)
      let x = this.embed(tokens)
      for (const layer of [...this.layers].slice(0, count)) {
        const next = layer.forward(x, context)
        x.dispose()
        x = next
      }
      return count === undefined ? this.norm.forward(x) : x
    })
  }

  /** What the first layer gets. */
  embed(tokens: Tensor): Tensor {
    const x = this.embed_tokens.forward(tokens)
    if (this.#spec.embeddingScale === 1) return x
    return mul(x, this.#spec.embeddingScale)
  }
}
