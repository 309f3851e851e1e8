/** StableLM: Llama with layer norms and heads rotated in part. */
import type { ConfigReader } from '../../checkpoint/config.js'
import { readDecoderSpec, type DecoderSpec } from '../spec.js'

export function stablelm(config: ConfigReader): DecoderSpec {
  if (config.boolean('qk_layernorm', false)) config.fail('qk_layernorm is not supported')
  return readDecoderSpec(config, {
    normType: 'layer',
    normEps: config.positive('layer_norm_eps', 1e-5),
    parallel: config.boolean('use_parallel_residual', false) ? 'one norm' : 'no',
    qkvBias: config.boolean('use_qkv_bias', false),
    outputBias: false,
    mlpBias: false,
    rotary: { partialRotaryFactor: 0.25 },
  })
}
