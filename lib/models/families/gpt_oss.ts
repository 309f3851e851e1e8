/** gpt-oss: experts in one tensor, attention sinks, a window in every other layer (arXiv 2508.10925). */
import type { ConfigReader } from '../../checkpoint/config.js'
import { readDecoderSpec, readWindows, type DecoderSpec } from '../spec.js'

export function gptOss(config: ConfigReader): DecoderSpec {
  const spec = readDecoderSpec(config, {
    names: { gate: 'router' },
    headDim: config.count('head_dim', 64),
    normEps: config.positive('rms_norm_eps', 1e-5),
    qkvBias: config.boolean('attention_bias', true),
    outputBias: config.boolean('attention_bias', true),
    mlpBias: true,
    attentionSinks: true,
    rounding: { normOnce: true },
    rotary: { theta: 150000 },
  })
  // without layer_types every other layer has the window, from the first on
  const windows = readWindows(config)
  const typed = config.array('layer_types') !== undefined
  return {
    ...spec,
    layers: spec.layers.map((layer, i) => ({ ...layer, window: typed || i % 2 === 0 ? windows[i]! : 0 })),
    experts: {
      count: config.alias({ num_local_experts: ['num_experts'] }).count('num_local_experts', 32),
      perToken: config.alias({ num_experts_per_tok: ['experts_per_token'] }).count('num_experts_per_tok', 4),
      intermediateSize: spec.intermediateSize,
      normalize: true,
      routerBias: true,
      groupRouting: null,
      sharedSize: 0,
      fused: { limit: config.positive('swiglu_limit', 7) },
      layers: spec.layers.map(() => true),
    },
  }
}
