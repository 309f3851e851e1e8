/** Models from checkpoint folders. */
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { isCurrent, readConfig, readGenerationDefaults, type ConfigReader } from '../checkpoint/config.js'
import { modelFolder } from '../checkpoint/folder.js'
import { loadCheckpoint, type LoadOptions } from '../checkpoint/load.js'
import { FROM_SAFETENSORS } from '../checkpoint/safetensors.js'
import { Checkpoint } from '../checkpoint/source.js'
import { HalfbyteError } from '../errors.js'
import { Tokenizer } from '../generation/tokenizer.js'
import { onMeta } from '../nn/parameter.js'
import { unknownName, wrongHandler } from '../options.js'
import { BitsAndBytesConfig, type BitsAndBytesConfigOptions } from '../quantization/config.js'
import { checkDType, DTYPES, type DType } from '../tensor/dtype.js'
import { emitWarning } from '../warning.js'
import { CausalLM } from './causal_lm.js'
import { readSpec } from './families/index.js'

export interface FromPretrainedOptions extends Omit<LoadOptions, 'dtype' | 'prequantized'> {
  /** Of what is not quantised. Default 'auto': the checkpoint's. */
  dtype?: DType | 'auto' | undefined
}

/** The dtype that config.json names, else that of the first floating-point tensor. */
function checkpointDtype(config: ConfigReader, checkpoint: Checkpoint): DType {
  const named = config.dtype()
  if (named) return named
  for (const { dtype } of checkpoint.tensors.values()) {
    const ours = FROM_SAFETENSORS[dtype]
    if (ours && DTYPES[ours].isFloat) return ours
  }
  return 'float32'
}

/** Fields that say how a quantised weight is used, not how it is stored. */
const RUNTIME: readonly string[] = [
  'llmInt8Threshold',
  'llmInt8EnableFp32CpuOffload',
  'bnb4bitComputeDtype',
  'bnbExact',
]

/** The checkpoint's own config, with what the caller may say about its use. */
function mergeConfigs(
  saved: BitsAndBytesConfig,
  given: BitsAndBytesConfig | BitsAndBytesConfigOptions | undefined,
  file: string,
  warn: (message: string) => void,
): BitsAndBytesConfig {
  if (!given) return saved
  const wanted = given instanceof BitsAndBytesConfig ? given : new BitsAndBytesConfig(given)
  if (wanted.loadIn4bit !== saved.loadIn4bit) {
    const bits = (config: BitsAndBytesConfig) => (config.loadIn4bit ? '4-bit' : '8-bit')
    throw new HalfbyteError(
      'ERR_HALFBYTE_CONFIG',
      `${file}: the checkpoint is quantised to ${bits(saved)}, ${bits(wanted)} was asked for; ` +
        'quantise the original checkpoint, or leave quantizationConfig out',
    )
  }
  const { quantMethod: _method, ...options } = saved
  const changed = wanted
    .given()
    .filter((name) => JSON.stringify(wanted[name]) !== JSON.stringify(saved[name]))
  const changes = changed
    .filter((name) => RUNTIME.includes(name))
    .map((name) => [name, wanted[name]] as const)
  const ignored = changed.filter((name) => !RUNTIME.includes(name))
  if (ignored.length > 0) {
    const own = ignored.map((name) => `${name} ${JSON.stringify(saved[name])}`).join(', ')
    warn(
      `${file}: the checkpoint is quantised already, with ${own}; what was asked for instead has no effect`,
    )
  }
  return new BitsAndBytesConfig({ ...options, ...Object.fromEntries(changes) })
}

const KNOWN: readonly string[] = [
  'quantizationConfig',
  'modulesToNotConvert',
  'dtype',
  'device',
  'deviceMap',
  'maxMemory',
  'offloadFolder',
  'signal',
  'onProgress',
  'onWarning',
] satisfies (keyof FromPretrainedOptions)[]

function checkOptions(options: FromPretrainedOptions): void {
  if (typeof options !== 'object' || options === null) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_VALUE',
      `fromPretrained: the options are ${JSON.stringify(options)}, they must be an object`,
    )
  }
  // loadIn4bit beside quantizationConfig instead of in it would load a model four times as large
  const problem = unknownName(options, KNOWN, 'option') ?? wrongHandler(options)
  if (problem !== undefined) throw new HalfbyteError('ERR_HALFBYTE_VALUE', `fromPretrained: ${problem}`)
}

/** How the checkpoint says that it is quantised. */
export function savedConfig(config: ConfigReader): BitsAndBytesConfig | undefined {
  const saved = config.object('quantization_config')
  try {
    return saved && BitsAndBytesConfig.fromJSON(saved.raw)
  } catch (error) {
    return config.fail((error as HalfbyteError).message)
  }
}

async function fromPretrained(path: string | URL, options: FromPretrainedOptions = {}): Promise<CausalLM> {
  checkOptions(options)
  const folder = modelFolder(path, 'fromPretrained')
  options.signal?.throwIfAborted()
  const config = readConfig(folder)
  const spec = readSpec(config)
  const saved = savedConfig(config)
  const { quantizationConfig: given, dtype = 'auto', ...rest } = options
  const quantizationConfig = saved
    ? mergeConfigs(saved, given, config.file, options.onWarning ?? emitWarning)
    : given && (given instanceof BitsAndBytesConfig ? given : new BitsAndBytesConfig(given))
  // what is small and may be wrong comes before what is large
  const generationDefaults = readGenerationDefaults(folder, config)
  const tokenizer = existsSync(join(folder, 'tokenizer.json'))
    ? await Tokenizer.fromPretrained(folder)
    : undefined
  using checkpoint = Checkpoint.open(folder)
  // saved anew in between: the weights are another model's
  if (!isCurrent(config)) return await fromPretrained(path, options)
  const model = onMeta(() => new CausalLM(spec, config))
  const report = await loadCheckpoint(model, checkpoint, {
    ...rest,
    quantizationConfig,
    prequantized: saved !== undefined,
    dtype: dtype === 'auto' ? checkpointDtype(config, checkpoint) : checkDType(dtype, 'fromPretrained'),
  })
  model.hfDeviceMap = report.deviceMap
  model.folder = folder
  model.generationDefaults = generationDefaults
  model.tokenizer = tokenizer
  try {
    model.model.prepare(1, model.device!)
  } catch (error) {
    model.dispose()
    throw error
  }
  return model.eval()
}

export const AutoModelForCausalLM = {
  /**
   * The model in a folder (a path or a file: URL) as transformers (or savePretrained) writes it: config.json and safetensors, plain or
   * quantised by bitsandbytes. With a quantizationConfig its linear layers are quantised as they arrive.
   */
  fromPretrained,
}
