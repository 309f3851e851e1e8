/** Granite: Llama with a factor on embeddings, attention scores, residuals and logits. */
import type { ConfigReader } from '../../checkpoint/config.js'
import { readDecoderSpec, type DecoderSpec } from '../spec.js'

export function granite(config: ConfigReader): DecoderSpec {
  return readDecoderSpec(config, {
    embeddingScale: config.number('embedding_multiplier', 1),
    attentionScale: config.number('attention_multiplier', 1),
    residualScale: config.number('residual_multiplier', 1),
    logitScale: 1 / config.number('logits_scaling', 1),
  })
}
