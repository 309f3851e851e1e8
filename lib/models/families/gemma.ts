/** Gemma 1, 2 and 3 (text): norms whose weights are stored less one, scaled embeddings, GELU. */
import type { ConfigReader } from '../../checkpoint/config.js'
import { readRope } from '../rope.js'
import { readActivation, readDecoderSpec, readWindows, type DecoderSpec } from '../spec.js'

function common(config: ConfigReader, own: Partial<DecoderSpec>): DecoderSpec {
  // hidden_activation is the newer field; before it hidden_act said gelu and meant its tanh form
  const newer = config.get('hidden_activation') !== undefined
  const named = readActivation(config, newer ? 'hidden_activation' : 'hidden_act', 'gelu_pytorch_tanh')
  return readDecoderSpec(config, {
    normWeightOffset: 1,
    embeddingScale: Math.sqrt(config.count('hidden_size')),
    embeddingScaleBuffer: true,
    tieWordEmbeddings: config.boolean('tie_word_embeddings', true),
    activation: !newer && named === 'gelu' ? 'gelu_tanh' : named,
    mlpBias: false,
    ...own,
  })
}

export function gemma(config: ConfigReader): DecoderSpec {
  return common(config, {})
}

/** layer_types, or a window in all but every `interval`-th layer where older files have none. */
function windows(config: ConfigReader, interval: number): number[] {
  const each = readWindows(config)
  return config.array('layer_types') ? each : each.map((window, i) => ((i + 1) % interval === 0 ? 0 : window))
}

export function gemma2(config: ConfigReader): DecoderSpec {
  const spec = common(config, {
    norms: 'both',
    attentionScale: config.number('query_pre_attn_scalar', 256) ** -0.5,
    attentionSoftcap: config.number('attn_logit_softcapping', 0),
    logitSoftcap: config.number('final_logit_softcapping', 0),
  })
  const each = windows(config, 2)
  return { ...spec, layers: spec.layers.map((layer, i) => ({ ...layer, window: each[i]! })) }
}

export function gemma3(config: ConfigReader): DecoderSpec {
  const each = windows(
    config,
    config.count('sliding_window_pattern', config.count('_sliding_window_pattern', 6)),
  )
  const options = {
    headDim: config.count('head_dim', 256),
    maxPositions: config.count('max_position_embeddings', 131072),
  }
  const parts = config.object('rope_parameters')?.get('full_attention') !== undefined
  const full = parts
    ? readRope(config, options, 'full_attention')
    : readRope(config, { ...options, theta: 1e6 })
  const sliding = parts
    ? readRope(config, options, 'sliding_attention')
    : {
        ...full,
        scale: 1,
        inverseFrequencies: Float32Array.from(
          full.inverseFrequencies,
          (_, i) => config.number('rope_local_base_freq', 10000) ** ((-2 * i) / full.dim),
        ),
      }
  const layers = each.map((window) => ({ window, rope: window > 0 ? sliding : full }))
  return common(config, {
    norms: 'both',
    queryKeyNorm: 'head',
    headDim: options.headDim,
    attentionScale: config.number('query_pre_attn_scalar', 256) ** -0.5,
    attentionSoftcap: config.number('attn_logit_softcapping', 0),
    logitSoftcap: config.number('final_logit_softcapping', 0),
    ropes: [full, sliding].filter((rope) => layers.some((layer) => layer.rope === rope)),
    layers,
  })
}
