/** Phi-3 and 3.5 with the short context, and Phi-4: Llama with fused projections. */
import type { ConfigReader } from '../../checkpoint/config.js'
import { readDecoderSpec, type DecoderSpec } from '../spec.js'

export function phi3(config: ConfigReader): DecoderSpec {
  return readDecoderSpec(config, {
    projections: 'rows',
    mlp: 'gated in one',
    qkvBias: false,
    outputBias: false,
    mlpBias: false,
    normEps: config.number('rms_norm_eps', 1e-5),
  })
}
