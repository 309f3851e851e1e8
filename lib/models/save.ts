/** Model folders as transformers lays them out. */
import { copyFile } from 'node:fs/promises'
import { existsSync, mkdirSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { saveStateDict, writeError, writeJson, type WriteOptions } from '../checkpoint/write.js'
import type { CausalLM } from './causal_lm.js'

/** What goes along unchanged. */
const COPIED = [
  'generation_config.json',
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'chat_template.jinja',
]

export async function savePretrained(
  model: CausalLM,
  folder: string,
  options: WriteOptions & { maxShardSize?: number | string | undefined },
): Promise<void> {
  try {
    mkdirSync(folder, { recursive: true })
  } catch (cause) {
    throw writeError(folder, cause)
  }
  const state = await model.stateDict()
  try {
    await saveStateDict(folder, state, options)
  } finally {
    for (const tensor of state.values()) tensor.dispose()
  }
  await writeJson(join(folder, 'config.json'), savedConfig(model))
  if (model.folder === undefined || resolve(model.folder) === resolve(folder)) return
  for (const name of COPIED) {
    const from = join(model.folder, name)
    if (!existsSync(from)) continue
    try {
      await copyFile(from, join(folder, name))
    } catch (cause) {
      throw writeError(join(folder, name), cause)
    }
  }
}

/** config.json of the model as it is now: its dtype, and how it is quantised. */
export function savedConfig(model: CausalLM): Record<string, unknown> {
  const { torch_dtype: _older, quantization_config: _before, ...rest } = model.config.raw
  return {
    ...rest,
    dtype: model.computeDtype,
    ...(model.quantizationConfig && { quantization_config: model.quantizationConfig.toJSON() }),
  }
}
