/** DeepSeek V3 (arXiv 2412.19437): latent attention, experts in groups, and one MLP for every token. */
import type { ConfigReader } from '../../checkpoint/config.js'
import { readDecoderSpec, type DecoderSpec } from '../spec.js'

export function deepseekV3(config: ConfigReader): DecoderSpec {
  const rotaryDim = config.count('qk_rope_head_dim', 64)
  const plainDim = config.count('qk_nope_head_dim', 128)
  const attentionBias = config.boolean('attention_bias', false)
  const scaling = config.object('rope_parameters') ?? config.object('rope_scaling')
  const spec = readDecoderSpec(config, {
    headDim: rotaryDim, // what is rotated; of the attention below
    qkvBias: attentionBias,
    outputBias: attentionBias,
    mlpBias: false,
    latentAttention: {
      queryRank: config.get('q_lora_rank') === undefined ? null : config.count('q_lora_rank'),
      keyValueRank: config.count('kv_lora_rank', 512),
      plainDim,
      rotaryDim,
      valueDim: config.count('v_head_dim', 128),
    },
    rotary: { interleaved: config.boolean('rope_interleave', true) },
  })
  // with YaRN the scores grow with the length of the context
  const factor = scaling?.number('factor', 1) ?? 1
  const all = scaling?.number('mscale_all_dim', 0) ?? 0
  const growth = all > 0 && factor > 1 ? 0.1 * all * Math.log(factor) + 1 : 1
  const size = config.count('moe_intermediate_size', 2048)
  const dense = config.number('first_k_dense_replace', 3)
  const groups = config.count('n_group', 8)
  const count = config.count('n_routed_experts', 256)
  if (count % groups !== 0 || count / groups < 2) {
    config.fail(`n_routed_experts ${count} do not make n_group ${groups} groups of two or more`)
  }
  return {
    ...spec,
    headDim: plainDim + rotaryDim,
    numKeyValueHeads: spec.numHeads,
    attentionScale: growth ** 2 / Math.sqrt(plainDim + rotaryDim),
    experts: {
      count,
      perToken: config.count('num_experts_per_tok', 8),
      intermediateSize: size,
      normalize: config.boolean('norm_topk_prob', true),
      routerBias: false,
      groupRouting: {
        groups,
        chosenGroups: config.count('topk_group', 4),
        scale: config.number('routed_scaling_factor', 2.5),
      },
      sharedSize: size * config.number('n_shared_experts', 1),
      fused: null,
      layers: spec.layers.map((_, i) => i >= dense),
    },
  }
}
