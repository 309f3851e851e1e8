/** Loading the model that a command is about, with a progress line. */
import { readConfig } from '../checkpoint/config.js'
import { modelFolder } from '../checkpoint/folder.js'
import { savedConfig } from '../models/auto.js'
import { AutoModelForCausalLM, type CausalLM } from '../models/index.js'
import type { Invocation } from './command.js'
import { modelDType, placementFields, quantizationFields } from './model_options.js'
import { Progress } from './progress.js'

export interface Loaded {
  model: CausalLM
  seconds: number
}

/** What the options ask for, in a word: nf4, nf4 double, int8, ... */
export function describeWeights(model: CausalLM): string {
  const config = model.quantizationConfig
  if (!config) return model.computeDtype
  if (config.loadIn8bit) return `int8, threshold ${config.llmInt8Threshold}`
  return config.bnb4bitQuantType + (config.bnb4bitUseDoubleQuant ? ', double quantised' : '')
}

export async function loadModel(path: string, { flags, signal }: Invocation): Promise<Loaded> {
  const folder = modelFolder(path, 'halfbyte')
  const quantizationConfig = quantizationFields(flags, () => savedConfig(readConfig(folder)))
  const dtype = modelDType(flags)
  using progress = new Progress('Loading')
  const began = performance.now()
  const model = await AutoModelForCausalLM.fromPretrained(folder, {
    quantizationConfig,
    dtype,
    ...placementFields(flags),
    signal,
    onProgress: ({ loadedBytes, totalBytes }) => progress.update(loadedBytes, totalBytes),
  })
  return { model, seconds: (performance.now() - began) / 1e3 }
}
