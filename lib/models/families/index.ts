/** Every family by the model_type of its config.json. */
import type { ConfigReader } from '../../checkpoint/config.js'
import type { DecoderSpec } from '../spec.js'
import { gemma, gemma2, gemma3 } from './gemma.js'
import { granite } from './granite.js'
import { llama } from './llama.js'
import { mistral } from './mistral.js'
import { olmo2 } from './olmo2.js'
import { phi3 } from './phi3.js'
import { qwen2, qwen3 } from './qwen.js'
import { smollm3 } from './smollm3.js'

export const FAMILIES: Readonly<Record<string, (config: ConfigReader) => DecoderSpec>> = {
  gemma,
  gemma2,
  gemma3_text: gemma3,
  granite,
  llama,
  mistral,
  olmo2,
  phi3,
  qwen2,
  qwen3,
  smollm3,
}

export function readSpec(config: ConfigReader): DecoderSpec {
  const type = config.string('model_type')
  const family = Object.hasOwn(FAMILIES, type) ? FAMILIES[type] : undefined
  if (!family) {
    config.fail(`model_type ${JSON.stringify(type)} is not known; known are ${Object.keys(FAMILIES).join(', ')}`)
  }
  return family(config)
}
