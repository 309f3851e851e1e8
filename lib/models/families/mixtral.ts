/** Mixtral (arXiv 2401.04088): Mistral with experts. */
import type { ConfigReader } from '../../checkpoint/config.js'
import { readDecoderSpec, type DecoderSpec } from '../spec.js'

export function mixtral(config: ConfigReader): DecoderSpec {
  const spec = readDecoderSpec(config, {
    names: { mlp: 'block_sparse_moe', gate_proj: 'w1', down_proj: 'w2', up_proj: 'w3' },
    normEps: config.positive('rms_norm_eps', 1e-5),
    qkvBias: false,
    outputBias: false,
    mlpBias: false,
    rotary: { theta: 1e6 },
  })
  return {
    ...spec,
    experts: {
      count: config.count('num_local_experts', 8),
      perToken: config.count('num_experts_per_tok', 2),
      intermediateSize: spec.intermediateSize,
      normalize: true,
      routerBias: false,
      groupRouting: null,
      sharedSize: 0,
      fused: null,
      layers: spec.layers.map(() => true),
    },
  }
}
