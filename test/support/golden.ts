/**
 * What bitsandbytes and transformers computed: files under the folder that HALFBYTE_GOLDEN names, else their committed
 * subset. A test of data that neither has is skipped and says so.
 */
import { existsSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { Tensor, type DType } from '../../lib/index.js'
import { root } from './files.js'
import type { FloatDType } from './reference.js'
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

/** The committed subset. */
export const goldenSubset = join(root, 'test', 'fixtures', 'golden')

/** The path of a file or folder of golden data, undefined where there is none. */
export function goldenPath(path: string): string | undefined {
  const folders = [process.env['HALFBYTE_GOLDEN'], goldenSubset]
  const folder = folders.find((f) => f && existsSync(join(f, path)))
  return folder && join(folder, path)
}

/** it() with the path of golden data, or a skipped test that says which are missing. */
export function itWithGolden(path: string, name: string, body: (path: string) => Promise<void> | void): void {
  const found = goldenPath(path)
  if (found) it(name, async () => body(found))
  else it.skip(`${name} (no ${path}: set HALFBYTE_GOLDEN to the golden data)`, () => undefined)
}

/** Cases (NAME.json) and their tensors (NAME.safetensors). */
export class Golden<Case> {
  readonly cases: readonly Case[]
  readonly #tensors: Map<string, Stored>

  constructor(path: string) {
    this.cases = JSON.parse(readFileSync(`${path}.json`, 'utf8')) as Case[]
    this.#tensors = readSafetensors(`${path}.safetensors`)
  }

  /** The rest of every name that starts like this. */
  names(prefix: string): string[] {
    return [...this.#tensors.keys()].flatMap((name) =>
      name.startsWith(prefix) ? [name.slice(prefix.length)] : [],
    )
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

/** The committed subset has them, if HALFBYTE_GOLDEN does not. */
export function readGolden<Case>(name: string): Golden<Case> {
  const file = goldenPath(`${name}.safetensors`)
  if (!file) throw new Error(`no golden data ${name}`)
  return new Golden<Case>(file.replace(/\.safetensors$/, ''))
}

/** A linear layer of int8.json. */
export interface Int8Case {
  case: number
  M: number
  K: number
  N: number
  threshold: number
  outliers: number
  bias: boolean
}

/** A linear layer of linear4.json. */
export interface Linear4Case {
  case: number
  M: number
  K: number
  N: number
  quant_type: 'nf4' | 'fp4'
  blocksize: number
  nested: boolean
  dtype: FloatDType
  bias: boolean
}
