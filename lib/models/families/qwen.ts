/**
 * Qwen 2 and 2.5: biases on queries, keys and values. Qwen 3: norms on the heads of queries and keys instead, and experts
 * in its MoE models.
 */
import type { ConfigReader } from '../../checkpoint/config.js'
import { readDecoderSpec, readWindows, type DecoderSpec } from '../spec.js'

/** Without layer_types the window is for the layers from max_window_layers on. */
function windows(config: ConfigReader): number[] {
  if (!config.boolean('use_sliding_window', false)) return readWindows(config).map(() => 0)
  if (config.array('layer_types')) return readWindows(config)
  const first = config.number('max_window_layers', 28)
  return readWindows(config).map((window, i) => (i >= first ? window : 0))
}

function withWindows(config: ConfigReader, spec: DecoderSpec): DecoderSpec {
  const each = windows(config)
  return { ...spec, layers: spec.layers.map((layer, i) => ({ ...layer, window: each[i]! })) }
}

export function qwen2(config: ConfigReader): DecoderSpec {
  const spec = readDecoderSpec(config, { qkvBias: true, outputBias: false, mlpBias: false })
  return withWindows(config, spec)
}

export function qwen3(config: ConfigReader): DecoderSpec {
  return withWindows(config, readDecoderSpec(config, { queryKeyNorm: 'head', mlpBias: false }))
}

export function qwen3Moe(file: ConfigReader): DecoderSpec {
  const config = file.alias({ num_experts: ['num_local_experts'] })
  const spec = qwen3(config)
  const step = config.count('decoder_sparse_step', 1)
  const dense = config.array('mlp_only_layers') ?? []
  return {
    ...spec,
    experts: {
      count: config.count('num_experts', 128),
      perToken: config.count('num_experts_per_tok', 8),
      intermediateSize: config.count('moe_intermediate_size', 768),
      normalize: config.boolean('norm_topk_prob', false),
      routerBias: false,
      groupRouting: null,
      sharedSize: 0,
      fused: null,
      layers: spec.layers.map((_, i) => !dense.includes(i) && (i + 1) % step === 0),
    },
  }
}
