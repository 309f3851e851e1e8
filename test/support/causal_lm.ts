/** Asking causal models: the same few tokens in, logits and new tokens out. */
import { AutoModelForCausalLM, type CausalLM, type FromPretrainedOptions } from '../../lib'

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
