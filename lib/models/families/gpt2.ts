/** GPT-2: learned positions, layer norms, and linear layers that are stored transposed (Conv1D). */
import type { ConfigReader } from '../../checkpoint/config.js'
import { readActivation, readDecoderSpec, type DecoderSpec } from '../spec.js'

const FIELDS = {
  hidden_size: ['n_embd'],
  num_attention_heads: ['n_head'],
  num_hidden_layers: ['n_layer'],
  max_position_embeddings: ['n_positions'],
  intermediate_size: ['n_inner'],
}

export function gpt2(file: ConfigReader): DecoderSpec {
  const config = file.alias(FIELDS)
  if (config.boolean('scale_attn_by_inverse_layer_idx', false)) {
    config.fail('scale_attn_by_inverse_layer_idx is not supported')
  }
  if (config.boolean('add_cross_attention', false))
    config.fail('add_cross_attention is for an encoder-decoder')
  return readDecoderSpec(config, {
    names: {
      model: 'transformer',
      embed_tokens: 'wte',
      embed_positions: 'wpe',
      layers: 'h',
      norm: 'ln_f',
      input_layernorm: 'ln_1',
      self_attn: 'attn',
      qkv_proj: 'c_attn',
      o_proj: 'c_proj',
      post_attention_layernorm: 'ln_2',
      up_proj: 'c_fc',
      down_proj: 'c_proj',
    },
    intermediateSize: config.count('intermediate_size', 4 * config.count('hidden_size')),
    learnedPositions: { offset: 0 },
    tieWordEmbeddings: config.boolean('tie_word_embeddings', true),
    activation: readActivation(config, 'activation_function', 'gelu_new'),
    normType: 'layer',
    rounding: { activationInSteps: config.string('activation_function', 'gelu_new') === 'gelu_new' },
    normEps: config.positive('layer_norm_epsilon', 1e-5),
    transposed: true,
    projections: 'rows',
    mlp: 'plain',
    qkvBias: true,
    outputBias: true,
    mlpBias: true,
    ...(!config.boolean('scale_attn_weights', true) && { attentionScale: 1 }),
  })
}
