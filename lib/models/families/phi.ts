/** Phi 1, 1.5 and 2: attention and MLP side by side, heads rotated in part, biases everywhere. */
import type { ConfigReader } from '../../checkpoint/config.js'
import { readActivation, readDecoderSpec, type DecoderSpec } from '../spec.js'

export function phi(config: ConfigReader): DecoderSpec {
  if (config.boolean('qk_layernorm', false)) config.fail('qk_layernorm is not supported')
  return readDecoderSpec(config, {
    names: { o_proj: 'dense', up_proj: 'fc1', down_proj: 'fc2', norm: 'final_layernorm' },
    activation: readActivation(config, 'hidden_act', 'gelu_new'),
    normType: 'layer',
    normEps: config.positive('layer_norm_eps', 1e-5),
    parallel: 'one norm',
    rounding: {
      activationInSteps: config.string('hidden_act', 'gelu_new') === 'gelu_new',
      inputLast: true,
    },
    mlp: 'plain',
    qkvBias: true,
    outputBias: true,
    mlpBias: true,
    headBias: true,
    rotary: { partialRotaryFactor: 0.5 },
  })
}
