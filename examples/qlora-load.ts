/**
 * The way in which the QLoRA script loads its model (artidoro/qlora, qlora.py), call for call.
 * After `npm run build`: node dist/examples/qlora-load.js [DIR] [--bits 4|8] [--bf16|--fp16] [--max-memory-mb N]
 */
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import {
  AutoModelForCausalLM,
  BitsAndBytesConfig,
  devices,
  HalfbyteError,
  Linear4bit,
  Linear8bit,
} from 'halfbyte'
import type { CausalLM, ComputeDType } from 'halfbyte'

interface Arguments {
  modelNameOrPath: string
  bits: number
  bf16: boolean
  fp16: boolean
  doubleQuant: boolean
  quantType: 'nf4' | 'fp4'
  maxMemoryMB: number
}

export async function getAccelerateModel(args: Arguments): Promise<CausalLM> {
  const gpus = devices().filter(({ type }) => type === 'cuda')
  const maxMemory = Object.fromEntries(gpus.map(({ name }) => [name, `${args.maxMemoryMB}MB`]))
  const computeDtype: ComputeDType = args.fp16 ? 'float16' : args.bf16 ? 'bfloat16' : 'float32'
  return AutoModelForCausalLM.fromPretrained(args.modelNameOrPath, {
    deviceMap: 'auto',
    // without a GPU the map is of what the machine has
    ...(gpus.length > 0 && { maxMemory }),
    dtype: args.bf16 ? 'bfloat16' : 'float32',
    quantizationConfig: new BitsAndBytesConfig({
      loadIn4bit: args.bits === 4,
      loadIn8bit: args.bits === 8,
      llmInt8Threshold: 6.0,
      llmInt8HasFp16Weight: false,
      bnb4bitComputeDtype: computeDtype,
      bnb4bitUseDoubleQuant: args.doubleQuant,
      bnb4bitQuantType: args.quantType,
    }),
  })
}

/** The last names of all quantised layers: where adapters go. */
export function findAllLinearNames(model: CausalLM): string[] {
  const names = new Set<string>()
  for (const [path, module] of model.namedModules()) {
    if (module instanceof Linear4bit || module instanceof Linear8bit) names.add(path.split('.').at(-1)!)
  }
  return [...names].sort()
}

export async function main(args?: string[]): Promise<void> {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    ...(args && { args }),
    options: {
      bits: { type: 'string', default: '4' },
      bf16: { type: 'boolean', default: false },
      fp16: { type: 'boolean', default: false },
      'max-memory-mb': { type: 'string', default: '80000' },
    },
  })
  using model = await getAccelerateModel({
    modelNameOrPath: positionals[0] ?? join(__dirname, '../../models/tinypy-2m'),
    bits: Number(values.bits),
    bf16: values.bf16,
    fp16: values.fp16,
    doubleQuant: true,
    quantType: 'nf4',
    maxMemoryMB: Number(values['max-memory-mb']),
  })
  console.log(`loaded in ${model.isLoadedIn4bit ? 4 : 8} bits (${model.quantizationMethod})`)
  console.log(JSON.stringify(model.quantizationConfig, null, 2))
  console.log(`on ${JSON.stringify(model.hfDeviceMap)}`)
  console.log(`training through the quantised layers: ${model.isQuantizedTrainingEnabled}`)
  console.log(`adapters go to ${findAllLinearNames(model).join(', ')}`)
  console.log(`${model.numParameters()} parameters in ${model.getMemoryFootprint()} bytes`)
  console.log(`with the statistics of the quantised weights: ${model.getTrueFootprint()} bytes`)
}

if (require.main === module) {
  main().catch((error: unknown) => {
    console.error(error instanceof HalfbyteError ? `${error.message} (${error.code})` : error)
    process.exitCode = 1
  })
}
