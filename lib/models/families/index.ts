/** Every family by the model_type of its config.json. */
import type { ConfigReader } from '../../checkpoint/config.js'
import type { DecoderSpec } from '../spec.js'
import { bloom } from './bloom.js'
import { cohere } from './cohere.js'
import { deepseekV3 } from './deepseek.js'
import { falcon } from './falcon.js'
import { gemma, gemma2, gemma3 } from './gemma.js'
import { gpt2 } from './gpt2.js'
import { gptNeox } from './gpt_neox.js'
import { gptOss } from './gpt_oss.js'
import { granite } from './granite.js'
import { llama } from './llama.js'
import { mistral } from './mistral.js'
import { mixtral } from './mixtral.js'
import { olmo2 } from './olmo2.js'
import { opt } from './opt.js'
import { phi } from './phi.js'
import { phi3 } from './phi3.js'
import { qwen2, qwen3, qwen3Moe } from './qwen.js'
import { smollm3 } from './smollm3.js'
import { stablelm } from './stablelm.js'

export const FAMILIES: Readonly<Record<string, (config: ConfigReader) => DecoderSpec>> = {
  bloom,
  cohere,
  deepseek_v3: deepseekV3,
  falcon,
  gemma,
  gemma2,
  gemma3_text: gemma3,
  gpt2,
  gpt_neox: gptNeox,
  gpt_oss: gptOss,
  granite,
  llama,
  mistral,
  mixtral,
  olmo2,
  opt,
  phi,
  phi3,
  qwen2,
  qwen3,
  qwen3_moe: qwen3Moe,
  smollm3,
  stablelm,
}

export function readSpec(config: ConfigReader): DecoderSpec {
  const type = config.string('model_type')
  const family = Object.hasOwn(FAMILIES, type) ? FAMILIES[type] : undefined
  if (!family) {
    config.fail(
      `model_type ${JSON.stringify(type)} is not known; known are ${Object.keys(FAMILIES).join(', ')}`,
    )
  }
  return family(config)
}
