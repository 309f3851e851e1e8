/** Attention over a paged cache, for packed ragged batches: x is [T, hidden]. */
import type { PagedKvCache } from '../generation/cache.js'
import { zeros } from '../nn/init.js'
import { Conv1D, Linear } from '../nn/linear.js'
import { Linear4bit } from '../nn/linear4bit.js'
import { Module } from '../nn/module.js'
import { Parameter } from '../nn/parameter.js'
import type { StepRounding } from '../nn/rounding.js'
import type { Device } from '../tensor/device.js'
import { mul, pagedAttention, pagedWrite, type RaggedBatch } from '../tensor/ops.js'
import type { Tensor } from '../tensor/tensor.js'
import { makeNorm, type Norm } from './norm.js'
import type { DecoderSpec, LayerSpec } from './spec.js'

/** Where a call's tokens stand and where their keys and values go. */
export interface ForwardContext {
  batch: RaggedBatch
  /** int32 [T]. */
  positions: Tensor
  cache: PagedKvCache
  /** Rotates x [T, heads, D] as the layer wants it. */
  rotate(x: Tensor, layer: LayerSpec): Tensor
  /** float32 [heads], where scores depend on the distance. */
  alibiSlopes: Tensor | undefined
  /** The same for layers on another device. */
  on(device: Device): ForwardContext
}

export class Attention extends Module implements StepRounding {
  bnbExact = false
  readonly index: number
  q_proj?: Linear
  k_proj?: Linear
  v_proj?: Linear
  qkv_proj?: Linear
  o_proj: Linear
  /** float [heads]. */
  sinks?: Parameter
  q_norm?: Norm
  k_norm?: Norm
  readonly #spec: DecoderSpec

  constructor(spec: DecoderSpec, index: number) {
    super()
    this._names = spec.names
    this.#spec = spec
    this.index = index
    const { hiddenSize, numHeads, numKeyValueHeads, headDim } = spec
    const [queries, keys] = [numHeads * headDim, numKeyValueHeads * headDim]
    const Layer = spec.transposed ? Conv1D : Linear
    if (spec.projections === 'separate') {
      this.q_proj = new Layer(hiddenSize, queries, { bias: spec.qkvBias })
      this.k_proj = new Layer(hiddenSize, keys, { bias: spec.qkvBias })
      this.v_proj = new Layer(hiddenSize, keys, { bias: spec.qkvBias })
    } else {
      this.qkv_proj = new Layer(hiddenSize, queries + 2 * keys, { bias: spec.qkvBias })
    }
    this.o_proj = new Layer(queries, hiddenSize, { bias: spec.outputBias })
    if (spec.attentionSinks) this.sinks = new Parameter([numHeads], { init: zeros })
    if (spec.queryKeyNorm !== 'none') {
      const all = spec.queryKeyNorm === 'all'
      this.q_norm = makeNorm(spec, all ? queries : headDim)
      this.k_norm = makeNorm(spec, all ? keys : headDim)
    }
  }

  /** Queries [T, H, D], keys and values [T, KV, D] from one product. */
  #split(all: Tensor): [Tensor, Tensor, Tensor] {
    const { numHeads, numKeyValueHeads, headDim, projections } = this.#spec
    const tokens = all.shape[0]!
    if (projections === 'rows') {
      // heads of one product, told apart by their place in a row
      const heads = all.reshape(tokens, numHeads + 2 * numKeyValueHeads, headDim)
      let at = 0
      const next = (n: number) => heads.slice(1, at, (at += n))
      return [next(numHeads), next(numKeyValueHeads), next(numKeyValueHeads)]
    }
    const each = numHeads / numKeyValueHeads
    const heads = all.reshape(tokens, numKeyValueHeads, each + 2, headDim)
    const part = (begin: number, end: number) =>
      heads.slice(2, begin, end).reshape(tokens, numKeyValueHeads * (end - begin), headDim)
    return [part(0, each), part(each, each + 1), part(each + 1, each + 2)]
  }

  /** Queries [T, H, D], keys and values [T, KV, D], before rotation. */
  #project(x: Tensor): [Tensor, Tensor, Tensor] {
    const { numHeads, numKeyValueHeads, headDim, queryKeyNorm } = this.#spec
    if (this.qkv_proj) return this.#split(this.qkv_proj.forward(x))
    const tokens = x.shape[0]!
    const counts = [numHeads, numKeyValueHeads, numKeyValueHeads]
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
    const { batch, cache, alibiSlopes } = context
    const [keys, values] = [cache.keys[this.index]!, cache.values[this.index]!]
    const [queries, plainKeys, v] = this.#project(x)
    const [rotated, k] = [context.rotate(queries, layer), context.rotate(plainKeys, layer)]
    pagedWrite(keys, values, k, v, batch)
    const scaled = this.bnbExact && spec.rounding.scaledQueries
    const q = scaled ? mul(rotated.to('float32'), spec.attentionScale).to(x.dtype) : rotated
    const y = pagedAttention(q, keys, values, batch, {
      scale: scaled ? 1 : spec.attentionScale,
      roundWeights: this.bnbExact,
      softcap: spec.attentionSoftcap,
      window: layer.window,
      alibiSlopes,
      sinks: this.sinks?.value,
    })
    return this.o_proj.forward(y.reshape(x.shape[0]!, spec.numHeads * spec.headDim), residual)
  }
}
