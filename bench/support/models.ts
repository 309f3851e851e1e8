/** The forms in which the benchmarks load a model. */
import { join } from 'node:path'
import { AutoModelForCausalLM, type BitsAndBytesConfigOptions, type CausalLM, type Device } from 'halfbyte'

/** The checkpoint that comes with the repository. */
export const shipped = join(__dirname, '../../../models/tinypy-2m')

export const forms: readonly [string, BitsAndBytesConfigOptions | undefined][] = [
  ['float32', undefined],
  ['int8', { loadIn8bit: true }],
  ['nf4', { loadIn4bit: true, bnb4bitQuantType: 'nf4' }],
  ['nf4 double', { loadIn4bit: true, bnb4bitQuantType: 'nf4', bnb4bitUseDoubleQuant: true }],
]

export function load(
  folder: string | undefined,
  device: Device,
  quantizationConfig: BitsAndBytesConfigOptions | undefined,
): Promise<CausalLM> {
  return AutoModelForCausalLM.fromPretrained(folder ?? shipped, {
    device,
    quantizationConfig,
    dtype: 'float32',
  })
}

/** Tokens to begin with, the same for every form; `length` of them. */
export function prompt(model: CausalLM, length: number): number[] {
  return Array.from({ length }, (_, i) => (i * 7919 + 13) % model.spec.vocabSize)
}
