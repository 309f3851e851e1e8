/** Mistral: Llama with a sliding window (arXiv 2310.06825). */
import type { ConfigReader } from '../../checkpoint/config.js'
import { readDecoderSpec, type DecoderSpec } from '../spec.js'

export function mistral(config: ConfigReader): DecoderSpec {
  return readDecoderSpec(config, { qkvBias: false, outputBias: false, mlpBias: false })
}
