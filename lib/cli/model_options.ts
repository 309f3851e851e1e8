/** Options of the commands that load a model, and what they mean to the library. */
import type { Flags, OptionTable } from './command.js'
import { usageError } from './command.js'
import type { LoadOptions } from '../checkpoint/load.js'
import type { DeviceMapOption } from '../checkpoint/placement.js'
import type { GenerateOptions } from '../generation/options.js'
import type { BitsAndBytesConfig, BitsAndBytesConfigOptions } from '../quantization/config.js'
import type { DType } from '../tensor/index.js'

const quantizationOptions: OptionTable = {
  'load-in-4bit': { help: 'quantise linear layers to 4 bits while loading' },
  'load-in-8bit': { help: 'quantise linear layers to 8 bits while loading (LLM.int8())' },
  'quant-type': { value: 'nf4|fp4', help: '4-bit code book (default nf4)' },
  'double-quant': { help: 'quantise the absmax of 4-bit blocks too' },
  'compute-dtype': {
    value: 'DTYPE',
    help: 'dtype of 4-bit products: float32, float16, bfloat16 (default float32)',
  },
  'int8-threshold': {
    value: 'X',
    help: 'activations from X on are multiplied in 16 or 32 bits; 0: none (default 6)',
  },
  'skip-modules': { value: 'A,B', help: 'modules to leave as they are', multiple: true },
  'bnb-exact': { help: "LLM.int8() with bitsandbytes' float16 roundings" },
  dtype: {
    value: 'DTYPE',
    help: "dtype of what is not quantised: float32, float16, bfloat16 (default the checkpoint's)",
  },
}

const placementOptions: OptionTable = {
  'device-map': {
    value: 'MAP',
    help: `auto, balanced, balanced_low_0, sequential, or JSON: '{"": 0, "model.layers.9": "cpu"}'`,
  },
  'max-memory': { value: 'LIST', help: 'what each device may hold for a device map: 0=10GiB,cpu=30GiB' },
  'offload-folder': { value: 'DIR', help: 'where quantised modules on the disk are written' },
  'cpu-offload': { help: 'quantised modules may lie on the CPU and the disk, beside a GPU' },
}

export const modelOptions: OptionTable = { ...quantizationOptions, ...placementOptions }

/** Where the model is to go. */
export function placementFields(
  flags: Flags,
): Pick<LoadOptions, 'device' | 'deviceMap' | 'maxMemory' | 'offloadFolder'> {
  const map = flags.text('device-map')
  const limits = flags.text('max-memory')
  let deviceMap: DeviceMapOption | undefined = map
  if (map?.trimStart().startsWith('{')) {
    try {
      deviceMap = JSON.parse(map) as DeviceMapOption
    } catch (error) {
      throw usageError(`--device-map is not JSON: ${(error as Error).message}`)
    }
  }
  const entries = limits?.split(',').map((entry) => {
    const [place, size, ...rest] = entry.split('=').map((part) => part.trim())
    if (!place || !size || rest.length > 0) {
      throw usageError(`--max-memory has ${JSON.stringify(entry)}; write 0=10GiB,cpu=30GiB`)
    }
    return [place, size] as const
  })
  return {
    device: flags.text('device'),
    deviceMap,
    maxMemory: entries && Object.fromEntries(entries),
    offloadFolder: flags.text('offload-folder'),
  }
}

export const samplingOptions: OptionTable = {
  'max-new-tokens': { value: 'N', help: 'tokens to generate at most (default 128)' },
  temperature: {
    value: 'T',
    help: 'sampling temperature; 0: always the likeliest token (default as generation_config.json says)',
  },
  'top-k': { value: 'K', help: 'sample among the K likeliest tokens; 0: all' },
  'top-p': { value: 'P', help: 'sample among the likeliest tokens of joint probability P' },
  'min-p': { value: 'P', help: 'sample among tokens of at least P times the highest probability' },
  'repetition-penalty': { value: 'X', help: 'divide the scores of tokens that occurred by X (default 1)' },
  seed: { value: 'N', help: 'make sampling repeatable' },
  stop: { value: 'TEXT', help: 'end before this text; may be given more than once', multiple: true },
}

const DTYPE_NAMES: Readonly<Record<string, 'float32' | 'float16' | 'bfloat16'>> = {
  float32: 'float32',
  fp32: 'float32',
  float16: 'float16',
  fp16: 'float16',
  bfloat16: 'bfloat16',
  bf16: 'bfloat16',
}

function floatDType(flags: Flags, name: string): 'float32' | 'float16' | 'bfloat16' | undefined {
  const choice = flags.choice(name, Object.keys(DTYPE_NAMES))
  return choice === undefined ? undefined : DTYPE_NAMES[choice]
}

const ONLY_4BIT = ['quant-type', 'double-quant', 'compute-dtype']
const ONLY_8BIT = ['int8-threshold', 'bnb-exact']

/**
 * The fields of a BitsAndBytesConfig, or undefined when the model is to stay as it is. `readSaved` tells how the
 * checkpoint is quantised already: of that only what was given is said otherwise.
 */
export function quantizationFields(
  flags: Flags,
  readSaved: () => BitsAndBytesConfig | undefined = () => undefined,
): BitsAndBytesConfigOptions | undefined {
  const in4 = flags.switch('load-in-4bit')
  const in8 = flags.switch('load-in-8bit')
  if (in4 && in8) throw usageError('--load-in-4bit and --load-in-8bit were both given; choose one')
  const without = (names: readonly string[]) => names.find((name) => flags.has(name))
  const stray4 = in4 ? undefined : without(ONLY_4BIT)
  if (stray4) throw usageError(`--${stray4} says how to quantise to 4 bits; it needs --load-in-4bit`)
  const stray8 = in8 ? undefined : without(ONLY_8BIT)
  if (stray8) throw usageError(`--${stray8} says how to quantise to 8 bits; it needs --load-in-8bit`)
  const skip = flags.texts('skip-modules').flatMap((entry) => entry.split(',').map((name) => name.trim()))
  if (!in4 && !in8) {
    if (skip.length > 0) throw usageError('--skip-modules needs --load-in-4bit or --load-in-8bit')
    if (!flags.switch('cpu-offload')) return undefined
    const saved = readSaved()
    if (!saved) throw usageError('--cpu-offload needs --load-in-4bit or --load-in-8bit')
    const { loadIn4bit, loadIn8bit } = saved
    return { loadIn4bit, loadIn8bit, llmInt8EnableFp32CpuOffload: true }
  }
  const shared = {
    ...(skip.length > 0 && { llmInt8SkipModules: skip.filter(Boolean) }),
    ...(flags.switch('cpu-offload') && { llmInt8EnableFp32CpuOffload: true }),
  }
  if (in8) {
    const threshold = flags.number('int8-threshold', { min: 0 })
    return {
      loadIn8bit: true,
      ...(flags.has('bnb-exact') && { bnbExact: true }),
      ...(threshold === undefined ? {} : { llmInt8Threshold: threshold }),
      ...shared,
    }
  }
  const compute = floatDType(flags, 'compute-dtype')
  const quantType = flags.choice('quant-type', ['nf4', 'fp4']) ?? (readSaved() ? undefined : 'nf4')
  return {
    loadIn4bit: true,
    ...(quantType && { bnb4bitQuantType: quantType }),
    ...(flags.has('double-quant') && { bnb4bitUseDoubleQuant: true }),
    ...(compute === undefined ? {} : { bnb4bitComputeDtype: compute }),
    ...shared,
  }
}

export function modelDType(flags: Flags): DType | undefined {
  return floatDType(flags, 'dtype')
}

type SamplingFields = Pick<
  GenerateOptions,
  'temperature' | 'topK' | 'topP' | 'minP' | 'repetitionPenalty' | 'seed' | 'stopStrings'
> & { maxNewTokens: number }

/** What was asked of sampling; what was not said is left to the model's generation_config.json. */
export function samplingFields(flags: Flags): SamplingFields {
  const fields: SamplingFields = {
    maxNewTokens: flags.number('max-new-tokens', { min: 1, whole: true }) ?? 128,
  }
  const given: [Exclude<keyof SamplingFields, 'stopStrings'>, number | undefined][] = [
    ['temperature', flags.number('temperature', { min: 0 })],
    ['topK', flags.number('top-k', { min: 0, whole: true })],
    ['topP', flags.number('top-p', { min: 0, max: 1 })],
    ['minP', flags.number('min-p', { min: 0, max: 1 })],
    ['repetitionPenalty', flags.number('repetition-penalty', { min: 0 })],
    ['seed', flags.number('seed', { min: 0, whole: true })],
  ]
  for (const [name, value] of given) if (value !== undefined) fields[name] = value
  const stop = flags.texts('stop')
  if (stop.length > 0) fields.stopStrings = stop
  return fields
}
