/** OLMo 2: norms on what comes out of attention and MLP, and on queries and keys over all heads (arXiv 2501.00656). */
import type { ConfigReader } from '../../checkpoint/config.js'
import { readDecoderSpec, type DecoderSpec } from '../spec.js'

export function olmo2(config: ConfigReader): DecoderSpec {
  return readDecoderSpec(config, {
    norms: 'output',
    rounding: { normOnce: true },
    queryKeyNorm: 'all',
    mlpBias: false,
    normEps: config.number('rms_norm_eps', 1e-5),
  })
}
