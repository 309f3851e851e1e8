/**
 * Attention with latent keys and values (MLA, arXiv 2405.04434): a vector of low rank is made for each token, and all
 * heads' keys and values from it. A part of queries and keys is rotated; that of the keys is one for all heads. The cache
 * holds keys and values of every head, as that of other families does. x is [T, hidden].
 */
import { Linear } from '../nn/linear.js'
import { Module } from '../nn/module.js'
import { RMSNorm } from '../nn/norms.js'
import type { StepRounding } from '../nn/rounding.js'
import { concat, pagedAttention, pagedWrite } from '../tensor/ops.js'
import type { Tensor } from '../tensor/tensor.js'
import type { ForwardContext } from './attention.js'
import type { DecoderSpec, LatentSpec } from './spec.js'

/** Of the norms on latent vectors, in every config. */
const EPS = 1e-6

export class LatentAttention extends Module implements StepRounding {
  bnbExact = false
  readonly index: number
  q_proj?: Linear
  q_a_proj?: Linear
  q_a_layernorm?: RMSNorm
  q_b_proj?: Linear
  kv_a_proj_with_mqa: Linear
  kv_a_layernorm: RMSNorm
  kv_b_proj: Linear
  o_proj: Linear
  readonly #spec: DecoderSpec
  readonly #latent: LatentSpec

  constructor(spec: DecoderSpec, latent: LatentSpec, index: number) {
    super()
    this._names = spec.names
    this.#spec = spec
    this.#latent = latent
    this.index = index
    const { hiddenSize, numHeads, headDim, qkvBias } = spec
    const { queryRank, keyValueRank, plainDim, rotaryDim, valueDim } = latent
    const plain = { bias: false }
    if (queryRank === null) this.q_proj = new Linear(hiddenSize, numHeads * headDim, plain)
    else {
      this.q_a_proj = new Linear(hiddenSize, queryRank, { bias: qkvBias })
      this.q_a_layernorm = new RMSNorm(queryRank, { eps: EPS })
      this.q_b_proj = new Linear(queryRank, numHeads * headDim, plain)
    }
    this.kv_a_proj_with_mqa = new Linear(hiddenSize, keyValueRank + rotaryDim, { bias: qkvBias })
    this.kv_a_layernorm = new RMSNorm(keyValueRank, { eps: EPS })
    this.kv_b_proj = new Linear(keyValueRank, numHeads * (plainDim + valueDim), plain)
    this.o_proj = new Linear(numHeads * valueDim, hiddenSize, { bias: spec.outputBias })
  }

  #queries(x: Tensor): Tensor {
    if (this.q_proj) return this.q_proj.forward(x)
    return this.q_b_proj!.forward(this.q_a_layernorm!.forward(this.q_a_proj!.forward(x)))
  }

  /** `residual` is added to the result. */
  forward(x: Tensor, context: ForwardContext, residual?: Tensor): Tensor {
    const { numHeads, headDim, layers, attentionScale } = this.#spec
    const { keyValueRank, plainDim, rotaryDim, valueDim } = this.#latent
    const layer = layers[this.index]!
    const { batch, cache } = context
    const [keys, values] = [cache.keys[this.index]!, cache.values[this.index]!]
    const tokens = x.shape[0]!
    const rotate = (part: Tensor) => context.rotate(part.contiguous(), layer)

    const heads = this.#queries(x).reshape(tokens, numHeads, headDim)
    const q = concat([heads.slice(2, 0, plainDim), rotate(heads.slice(2, plainDim, headDim))], 2)
    const latent = this.kv_a_proj_with_mqa.forward(x)
    const common = latent.slice(1, keyValueRank, keyValueRank + rotaryDim).reshape(tokens, 1, rotaryDim)
    const made = this.kv_b_proj
      .forward(this.kv_a_layernorm.forward(latent.slice(1, 0, keyValueRank)))
      .reshape(tokens, numHeads, plainDim + valueDim)
    const rotated = rotate(common).expand(tokens, numHeads, rotaryDim)
    const k = concat([made.slice(2, 0, plainDim), rotated], 2)
    const v = made.slice(2, plainDim, plainDim + valueDim).contiguous()
    pagedWrite(keys, values, k, v, batch)
    const y = pagedAttention(q, keys, values, batch, {
      scale: attentionScale,
      window: layer.window,
      roundWeights: this.bnbExact,
    })
    return this.o_proj.forward(y.reshape(tokens, numHeads * valueDim), residual)
  }
}
