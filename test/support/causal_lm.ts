/** Causal models as tests make and ask them: the same few tokens in, logits and new tokens out. */
import {
  AutoModelForCausalLM,
  CausalLM,
  ConfigReader,
  onMeta,
  replaceWithQuantizedLinear,
  type BitsAndBytesConfigOptions,
  type FromPretrainedOptions,
} from '../../lib'
import { readSpec } from '../../lib/models/families'
import { tinyConfig } from './tiny_model'

export const ids = [3, 1, 4, 1, 5, 9, 2, 6]

export const load = (folder: string, options: FromPretrainedOptions): Promise<CausalLM> =>
  AutoModelForCausalLM.fromPretrained(folder, options)

export async function logits(model: CausalLM, tokens: readonly number[] = ids): Promise<Float32Array> {
  using result = model.forward(tokens)
  return await result.floats()
}

/** Logits, and the tokens that follow. */
export async function results(model: CausalLM, tokens: readonly number[] = ids) {
  const { tokenIds } = await model.generate(tokens, { maxNewTokens: 4, minNewTokens: 4 })
  return { logits: await logits(model, tokens), tokenIds }
}

/** A model in bfloat16 without memory: the tiny one, but for what `config` says. */
export function unloaded(config: Record<string, unknown>, quant?: BitsAndBytesConfigOptions): CausalLM {
  const reader = new ConfigReader({ ...tinyConfig, ...config }, 'config.json')
  const model = onMeta(() => new CausalLM(readSpec(reader), reader))
  model.to('bfloat16')
  if (quant) replaceWithQuantizedLinear(model, quant)
  return model
}
