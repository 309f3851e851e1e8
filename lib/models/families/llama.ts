/** Llama 2 and 3, and the many models that keep to its architecture. */
import type { ConfigReader } from '../../checkpoint/config.js'
import { readDecoderSpec, type DecoderSpec } from '../spec.js'

export function llama(config: ConfigReader): DecoderSpec {
  return readDecoderSpec(config)
}
