/** GPT-NeoX and Pythia (arXiv 2204.06745): parallel layers with two norms, heads rotated in part. */
import type { ConfigReader } from '../../checkpoint/config.js'
import { readActivation, readDecoderSpec, type DecoderSpec } from '../spec.js'

export function gptNeox(file: ConfigReader): DecoderSpec {
  const config = file.alias({ rope_theta: ['rotary_emb_base'], partial_rotary_factor: ['rotary_pct'] })
  const bias = config.boolean('attention_bias', true)
  return readDecoderSpec(config, {
    names: {
      model: 'gpt_neox',
      lm_head: 'embed_out',
      embed_tokens: 'embed_in',
      norm: 'final_layer_norm',
      self_attn: 'attention',
      qkv_proj: 'query_key_value',
      o_proj: 'dense',
      up_proj: 'dense_h_to_4h',
      down_proj: 'dense_4h_to_h',
    },
    activation: readActivation(config, 'hidden_act', 'gelu'),
    normType: 'layer',
    normEps: config.positive('layer_norm_eps', 1e-5),
    parallel: config.boolean('use_parallel_residual', true) ? 'two norms' : 'no',
    rounding: { inputLast: true },
    projections: 'heads',
    mlp: 'plain',
    qkvBias: bias,
    outputBias: bias,
    mlpBias: true,
    rotary: { partialRotaryFactor: 0.25 },
  })
}
