/** BLOOM (arXiv 2211.05100): no position embeddings but ALiBi, and a norm on the embeddings. */
import type { ConfigReader } from '../../checkpoint/config.js'
import { readDecoderSpec, type DecoderSpec } from '../spec.js'

export function bloom(file: ConfigReader): DecoderSpec {
  const config = file.alias({
    hidden_size: ['n_embed'],
    num_attention_heads: ['n_head'],
    num_hidden_layers: ['n_layer'],
    max_position_embeddings: ['seq_length'],
  })
  if (config.boolean('apply_residual_connection_post_layernorm', false)) {
    config.fail('apply_residual_connection_post_layernorm is not supported')
  }
  return readDecoderSpec(config, {
    names: {
      model: 'transformer',
      embed_tokens: 'word_embeddings',
      embedding_norm: 'word_embeddings_layernorm',
      layers: 'h',
      norm: 'ln_f',
      self_attn: 'self_attention',
      qkv_proj: 'query_key_value',
      o_proj: 'dense',
      up_proj: 'dense_h_to_4h',
      down_proj: 'dense_4h_to_h',
    },
    intermediateSize: 4 * config.count('hidden_size'),
    alibi: true,
    embeddingNorm: true,
    tieWordEmbeddings: config.boolean('tie_word_embeddings', true),
    activation: 'gelu_tanh',
    normType: 'layer',
    normEps: config.positive('layer_norm_epsilon', 1e-5),
    projections: 'heads',
    mlp: 'plain',
    qkvBias: true,
    outputBias: true,
    mlpBias: true,
  })
}
