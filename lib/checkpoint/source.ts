/**
 * The tensors of a checkpoint, wherever they lie: one safetensors file, or shards with an index
 * (model.safetensors.index.json: { weight_map: { tensor: shard } }).
 */
import { existsSync, statSync } from 'node:fs'
import { basename, dirname, join } from 'node:path'
import type { DeviceLike } from '../tensor/device.js'
import type { Tensor } from '../tensor/tensor.js'
import { checkpointError, type TensorInfo } from './header.js'
import { readJsonFile } from './json.js'
import { finishSave, INDEX_FILE, isPlainName, SINGLE_FILE } from './replace.js'
import { SafetensorsFile } from './safetensors.js'

export class Checkpoint implements Disposable {
  /** The folder, or the file, that it was opened from. */
  readonly path: string
  readonly files: readonly SafetensorsFile[]
  readonly tensors: ReadonlyMap<string, TensorInfo>
  readonly #holder: ReadonlyMap<string, SafetensorsFile>

  private constructor(path: string, holder: Map<string, SafetensorsFile>, files: SafetensorsFile[]) {
    this.path = path
    this.files = files
    this.#holder = holder
    this.tensors = new Map([...holder].map(([name, file]) => [name, file.info(name)]))
  }

  /** Opens a folder with model.safetensors or an index, a safetensors file, or an index file. */
  static open(path: string): Checkpoint {
    if (!existsSync(path)) throw checkpointError(path, 'there is no such file or folder')
    const isFolder = statSync(path).isDirectory()
    finishSave(isFolder ? path : dirname(path))
    if (!isFolder) {
      return path.endsWith('.index.json') ? Checkpoint.#sharded(path) : Checkpoint.#single(path)
    }
    const single = join(path, SINGLE_FILE)
    if (existsSync(single)) return Checkpoint.#single(single)
    const index = join(path, INDEX_FILE)
    if (existsSync(index)) return Checkpoint.#sharded(index)
    const pickled = ['pytorch_model.bin', 'pytorch_model.bin.index.json'].find((f) =>
      existsSync(join(path, f)),
    )
    throw checkpointError(
      path,
      `holds neither ${SINGLE_FILE} nor ${INDEX_FILE}` +
        (pickled ? `; ${pickled} is a pickle, which is not read: save the model as safetensors` : ''),
    )
  }

  static #single(path: string): Checkpoint {
    const file = SafetensorsFile.open(path)
    return new Checkpoint(path, new Map([...file.tensors.keys()].map((name) => [name, file])), [file])
  }

  static #sharded(path: string): Checkpoint {
    const map = readWeightMap(path)
    const names = [...new Set(map.values())].sort()
    const folder = dirname(path)
    const absent = names.filter((name) => !existsSync(join(folder, name)))
    if (absent.length > 0) {
      throw checkpointError(path, `names ${count(absent, 'shard')} that are not there: ${list(absent)}`)
    }
    const files = new Map<string, SafetensorsFile>()
    try {
      for (const name of names) files.set(name, SafetensorsFile.open(join(folder, name)))
      const holder = new Map<string, SafetensorsFile>()
      const missing: string[] = []
      for (const [tensor, shard] of map) {
        const file = files.get(shard)!
        if (file.tensors.has(tensor)) holder.set(tensor, file)
        else missing.push(`${tensor} (in ${shard})`)
      }
      if (missing.length > 0) {
        throw checkpointError(
          path,
          `names ${count(missing, 'tensor')} that the shards do not have: ${list(missing)}`,
        )
      }
      addUnlisted(holder, files)
      return new Checkpoint(path, holder, [...files.values()])
    } catch (error) {
      for (const file of files.values()) file.close()
      throw error
    }
  }

  has(name: string): boolean {
    return this.#holder.has(name)
  }

  info(name: string): TensorInfo {
    return this.#file(name).info(name)
  }

  /** The tensor on a device, in the dtype that the checkpoint has. */
  tensor(name: string, on: DeviceLike): Tensor {
    return this.#file(name).tensor(name, on)
  }

  bytes(name: string): Uint8Array {
    return this.#file(name).bytes(name)
  }

  /** Bytes of all tensors. */
  get totalBytes(): number {
    return [...this.tensors.values()].reduce((sum, info) => sum + info.end - info.begin, 0)
  }

  #file(name: string): SafetensorsFile {
    const file = this.#holder.get(name)
    if (!file) throw checkpointError(this.path, `has no tensor ${JSON.stringify(name)}`)
    return file
  }

  close(): void {
    for (const file of this.files) file.close()
  }

  [Symbol.dispose](): void {
    this.close()
  }
}

function readWeightMap(path: string): Map<string, string> {
  const map = readJsonFile(path)?.['weight_map']
  if (typeof map !== 'object' || map === null || Array.isArray(map)) {
    throw checkpointError(path, 'has no weight_map, an object that gives the shard of each tensor')
  }
  for (const [tensor, shard] of Object.entries(map)) {
    if (!isPlainName(shard)) {
      throw checkpointError(
        path,
        `places tensor ${JSON.stringify(tensor)} in ${JSON.stringify(shard)}, which is not a plain file name`,
      )
    }
  }
  return new Map(Object.entries(map as Record<string, string>))
}

/** Tensors that lie in a shard though the index does not list them. */
function addUnlisted(
  holder: Map<string, SafetensorsFile>,
  files: ReadonlyMap<string, SafetensorsFile>,
): void {
  const listed = new Set(holder.keys())
  for (const file of files.values()) {
    for (const name of file.tensors.keys()) {
      if (listed.has(name)) continue
      const other = holder.get(name)
      if (other) {
        throw checkpointError(
          file.path,
          `tensor ${JSON.stringify(name)} lies in ${basename(other.path)} too, and the index does not say which one counts`,
        )
      }
      holder.set(name, file)
    }
  }
}

export function count(items: readonly string[], noun: string): string {
  return `${items.length} ${noun}${items.length === 1 ? '' : 's'}`
}

/** The first few names, for messages. */
export function list(items: readonly string[], limit = 8): string {
  const more = items.length - limit
  return items.slice(0, limit).join(', ') + (more > 0 ? ` and ${more} more` : '')
}
