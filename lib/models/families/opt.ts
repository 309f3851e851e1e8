/** OPT (arXiv 2205.01068): GPT-3's architecture with ReLU; positions begin at row 2 of their table. */
import type { ConfigReader } from '../../checkpoint/config.js'
import { readActivation, readDecoderSpec, type DecoderSpec } from '../spec.js'

export function opt(file: ConfigReader): DecoderSpec {
  const config = file.alias({ intermediate_size: ['ffn_dim'] })
  // opt-350m alone
  if (!config.boolean('do_layer_norm_before', true))
    config.fail('do_layer_norm_before false is not supported')
  const hidden = config.count('hidden_size')
  if (config.count('word_embed_proj_dim', hidden) !== hidden) {
    config.fail('a word_embed_proj_dim other than hidden_size is not supported')
  }
  if (!config.boolean('layer_norm_elementwise_affine', true)) {
    config.fail('layer_norm_elementwise_affine false is not supported')
  }
  const bias = config.boolean('enable_bias', true)
  return readDecoderSpec(config, {
    names: {
      model: 'model.decoder',
      norm: 'final_layer_norm',
      input_layernorm: 'self_attn_layer_norm',
      o_proj: 'out_proj',
      post_attention_layernorm: 'final_layer_norm',
      up_proj: 'fc1',
      down_proj: 'fc2',
    },
    learnedPositions: { offset: 2 },
    tieWordEmbeddings: config.boolean('tie_word_embeddings', true),
    activation: readActivation(config, 'activation_function', 'relu'),
    normType: 'layer',
    normEps: 1e-5,
    mlp: 'flat',
    rounding: { scaledQueries: true },
    qkvBias: bias,
    outputBias: bias,
    mlpBias: bias,
  })
}
