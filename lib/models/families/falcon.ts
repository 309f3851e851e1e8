/** Falcon (arXiv 2311.16867): one key head for all queries, or one for each group; attention and MLP side by side. */
import type { ConfigReader } from '../../checkpoint/config.js'
import { readActivation, readDecoderSpec, type DecoderSpec } from '../spec.js'

export function falcon(file: ConfigReader): DecoderSpec {
  const config = file.alias({ intermediate_size: ['ffn_hidden_size'] })
  if (config.boolean('alibi', false)) config.fail('alibi is not supported in this family')
  const heads = config.count('num_attention_heads')
  const grouped = config.boolean('new_decoder_architecture', false)
  const single = config.boolean('multi_query', true)
  const norms = config.count('num_ln_in_parallel_attn', grouped ? 2 : 1)
  const parallel = grouped || config.boolean('parallel_attn', true)
  const bias = config.boolean('bias', false)
  return readDecoderSpec(config, {
    names: {
      model: 'transformer',
      embed_tokens: 'word_embeddings',
      layers: 'h',
      norm: 'ln_f',
      self_attn: 'self_attention',
      qkv_proj: 'query_key_value',
      o_proj: 'dense',
      up_proj: 'dense_h_to_4h',
      down_proj: 'dense_4h_to_h',
      ...(parallel && norms === 2 && { input_layernorm: 'ln_attn', post_attention_layernorm: 'ln_mlp' }),
    },
    intermediateSize: config.count('intermediate_size', 4 * config.count('hidden_size')),
    numKeyValueHeads: grouped ? config.count('num_kv_heads', heads) : single ? 1 : heads,
    tieWordEmbeddings: config.boolean('tie_word_embeddings', true),
    activation: readActivation(config, 'activation', 'gelu'),
    normType: 'layer',
    normEps: config.positive('layer_norm_epsilon', 1e-5),
    parallel: !parallel ? 'no' : norms === 2 ? 'two norms' : 'one norm',
    projections: 'heads',
    rounding: { inputLast: true },
    mlp: 'plain',
    qkvBias: bias,
    outputBias: bias,
    mlpBias: bias,
  })
}
