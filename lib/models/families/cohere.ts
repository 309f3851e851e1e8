/** Cohere's Command R: parallel layers, norms without bias, heads rotated in neighbouring pairs, scaled logits. */
import type { ConfigReader } from '../../checkpoint/config.js'
import { readDecoderSpec, type DecoderSpec } from '../spec.js'

export function cohere(config: ConfigReader): DecoderSpec {
  if (config.boolean('use_qk_norm', false)) config.fail('use_qk_norm is not supported')
  return readDecoderSpec(config, {
    tieWordEmbeddings: config.boolean('tie_word_embeddings', true),
    normType: 'layer',
    normBias: false,
    normEps: config.positive('layer_norm_eps', 1e-5),
    parallel: 'one norm',
    mlpBias: false,
    logitScale: config.number('logit_scale', 0.0625),
    rotary: { interleaved: true },
  })
}
