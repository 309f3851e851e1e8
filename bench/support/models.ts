/** The forms in which the benchmarks load a model. */
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import {
  AutoModelForCausalLM,
  HalfbyteError,
  type BitsAndBytesConfigOptions,
  type CausalLM,
  type Device,
} from 'halfbyte'

const SHIPPED = join(__dirname, '../../../models/tinypy-2m')

/** The folder that was named, else that of the checkpoint in the repository. */
export function folderOf(given: string | undefined): string {
  if (given === undefined && !existsSync(SHIPPED)) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_USAGE',
      'the package holds no model; name a checkpoint with --model DIR',
    )
  }
  return given ?? SHIPPED
}

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
  return AutoModelForCausalLM.fromPretrained(folderOf(folder), {
    device,
    quantizationConfig,
    dtype: 'float32',
  })
}

/** Tokens to begin with, the same for every form; `length` of them. */
export function prompt(model: CausalLM, length: number): number[] {
  return Array.from({ length }, (_, i) => (i * 7919 + 13) % model.spec.vocabSize)
}
