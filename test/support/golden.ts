/**
 * bitsandbytes' own results, as cases (NAME.json) and their tensors (NAME.safetensors): all of them from the folder that
 * HALFBYTE_GOLDEN names, else the committed subset.
 */
import { existsSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { Tensor, type DType } from '../../lib/index.js'
import { fixtures } from './files.js'
import { readSafetensors, type Data, type Stored } from './safetensors.js'

const DTYPES: Record<string, DType> = {
  F32: 'float32',
  F16: 'float16',
  BF16: 'bfloat16',
  I8: 'int8',
  U8: 'uint8',
  I32: 'int32',
  I64: 'int64',
}

export class Golden<Case> {
  readonly cases: readonly Case[]
  readonly #tensors: Map<string, Stored>

  constructor(path: string) {
    this.cases = JSON.parse(readFileSync(`${path}.json`, 'utf8')) as Case[]
    this.#tensors = readSafetensors(`${path}.safetensors`)
  }

  has(name: string): boolean {
    return this.#tensors.has(name)
  }

  stored(name: string): Stored {
    const stored = this.#tensors.get(name)
    if (!stored) throw new Error(`the golden data have no ${name}`)
    return stored
  }

  data(name: string): Data {
    return this.stored(name).data
  }

  tensor(name: string, device: string): Tensor {
    const { dtype, shape, data } = this.stored(name)
    return Tensor.from(data as Uint8Array, { dtype: DTYPES[dtype]!, shape, device })
  }
}

/** undefined where neither HALFBYTE_GOLDEN nor test/fixtures/golden has it. */
export function findGolden<Case>(name: string): Golden<Case> | undefined {
  const folders = [process.env['HALFBYTE_GOLDEN'], join(fixtures, 'golden')]
  const folder = folders.find((f) => f && existsSync(join(f, `${name}.safetensors`)))
  return folder ? new Golden<Case>(join(folder, name)) : undefined
}
