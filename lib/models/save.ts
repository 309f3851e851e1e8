/** Model folders as transformers lays them out. */
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import type { ConfigReader } from '../checkpoint/config.js'
import { JsonText } from '../checkpoint/json.js'
import { makeFolder, replaceFiles } from '../checkpoint/replace.js'
import {
  addCopy,
  addJson,
  addStateDict,
  DEFAULT_SHARD_SIZE,
  isSameFolder,
  parseSize,
  type WriteOptions,
} from '../checkpoint/write.js'
import { HalfbyteError } from '../errors.js'
import { Linear4bit } from '../nn/linear4bit.js'
import { Linear8bit } from '../nn/linear8bit.js'
import type { Module } from '../nn/module.js'
import type { BitsAndBytesConfig } from '../quantization/config.js'
import { jsonFloat } from '../quantization/json_float.js'
import type { Quantizable } from '../patch/replace.js'
import type { DType } from '../tensor/dtype.js'

/** A model that knows where it came from, and how it is quantised. */
interface SavedModel extends Module, Quantizable {
  readonly config: ConfigReader
  readonly computeDtype: DType
  readonly folder: string | undefined
}

/** What goes along unchanged. */
const COPIED = [
  'generation_config.json',
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'chat_template.jinja',
]

/**
 * All files of the folder are replaced together: when one cannot be written, an older save in it stays whole. One tensor
 * at a time is read, wherever it lies.
 */
export async function savePretrained(
  model: SavedModel,
  folder: string,
  options: WriteOptions & { maxShardSize?: number | string | undefined },
): Promise<void> {
  const maxShardSize = parseSize(options.maxShardSize ?? DEFAULT_SHARD_SIZE)
  await makeFolder(folder)
  const config = presentConfig(model)
  const state = await model.stateEntries()
  await replaceFiles(folder, async (files) => {
    const written = { ...options, maxShardSize, totalParameters: model.numParameters() }
    await addStateDict(files, folder, state, written)
    await addJson(files, 'config.json', config)
    if (model.folder === undefined || isSameFolder(model.folder, folder)) return
    for (const name of COPIED) {
      const from = join(model.folder, name)
      if (existsSync(from)) await addCopy(files, name, from)
    }
  })
}

/** How the model's layers are quantised, if they are: one way for all, or a config.json cannot say it. */
function quantizationOf(model: SavedModel): BitsAndBytesConfig | undefined {
  const config = model.quantizationConfig
  let found = false
  for (const [path, module] of model.namedModules()) {
    const bits = module instanceof Linear4bit ? 4 : module instanceof Linear8bit ? 8 : undefined
    if (bits === undefined) continue
    found = true
    if (bits === (config?.loadIn4bit ? 4 : config?.loadIn8bit ? 8 : undefined)) continue
    throw new HalfbyteError(
      'ERR_HALFBYTE_CONFIG',
      `savePretrained: ${path} is a ${module.constructor.name}, and quantizationConfig says ` +
        `${config ? `loadIn${config.loadIn4bit ? 4 : 8}bit` : 'nothing'}; a model that is patched in part needs ` +
        'model.quantizationConfig to say how, and all quantised layers must be of one kind',
    )
  }
  return found ? config : undefined
}

/**
 * config.json of the model as it is now: its dtype, and how it is quantised; sorted, and every other field written as it
 * was read.
 */
function presentConfig(model: SavedModel): Record<string, unknown> {
  const { torch_dtype: _older, quantization_config: _before, ...rest } = model.config.texts()
  const saved: [string, unknown][] = Object.entries({ ...rest, dtype: model.computeDtype })
  const config = quantizationOf(model)
  if (config) {
    const quantization = config.toJSON()
    // to Python's class a whole number is no threshold
    quantization['llm_int8_threshold'] = new JsonText(jsonFloat(config.llmInt8Threshold))
    const skip = model.replacement?.skipModules
    if (skip) quantization['llm_int8_skip_modules'] = skip
    saved.push(['quantization_config', quantization])
  }
  return Object.fromEntries(saved.sort(([a], [b]) => (a < b ? -1 : 1)))
}
