/**
 * Writing safetensors, as Python's writer lays them out: tensors by falling alignment of their dtype, then by name;
 * the header padded to a multiple of 8. Files are replaced all together: see replace.ts. One tensor at a time is in memory.
 */
import { existsSync, realpathSync } from 'node:fs'
import { readdir, readFile, type FileHandle } from 'node:fs/promises'
import { basename, dirname, resolve } from 'node:path'
import { HalfbyteError } from '../errors.js'
import { entryOf, type StateEntry } from '../nn/state_dict.js'
import { DTYPES, type DType } from '../tensor/dtype.js'
import { checkTensor } from '../tensor/ops/call.js'
import { sizeOf } from '../tensor/shape.js'
import type { Tensor } from '../tensor/tensor.js'
import { jsonText } from './json.js'
import { INDEX_FILE, makeFolder, replaceFiles, SINGLE_FILE, writeError, type Replacement } from './replace.js'

const TO_SAFETENSORS: Readonly<Record<DType, string>> = {
  float32: 'F32',
  float16: 'F16',
  bfloat16: 'BF16',
  int8: 'I8',
  uint8: 'U8',
  int32: 'I32',
  int64: 'I64',
}

/** The order of dtypes of one size in Python's writer. */
const RANK = ['I64', 'F32', 'I32', 'BF16', 'F16', 'I8', 'U8']

/** Of savePretrained() and saveStateDict(), as in transformers. */
export const DEFAULT_SHARD_SIZE = '50GB'

export interface WriteOptions {
  /** Parameters of the model, for the index of a sharded save. */
  totalParameters?: number | undefined
  signal?: AbortSignal | undefined
  onProgress?: ((progress: { writtenBytes: number; totalBytes: number; tensor: string }) => void) | undefined
}

interface Progress {
  written: number
  total: number
}

/** What is written: tensors by name, read one after the other. */
type Entries = ReadonlyMap<string, StateEntry>

/** Tensors by name, as a caller gives them. */
function entriesOf(tensors: ReadonlyMap<string, Tensor>): Entries {
  if (typeof (tensors as Partial<typeof tensors> | null | undefined)?.get !== 'function') {
    throw new HalfbyteError(
      'ERR_HALFBYTE_VALUE',
      'saving: a Map of tensors by name is needed, as stateDict() gives it; ' +
        'new Map(Object.entries(tensors)) makes one of an object',
    )
  }
  for (const [name, tensor] of tensors) {
    checkTensor('saving', JSON.stringify(name), tensor)
    if (name !== '__metadata__') continue
    throw new HalfbyteError(
      'ERR_HALFBYTE_VALUE',
      'saving: no tensor can be named __metadata__; in a safetensors file that is the name of something else',
    )
  }
  return new Map([...tensors].map(([name, tensor]) => [name, entryOf(tensor)]))
}

const bytesOf = ({ dtype, shape }: StateEntry): number => sizeOf(shape) * DTYPES[dtype].bytes

const totalOf = (entries: Entries): number =>
  [...entries.values()].reduce((sum, entry) => sum + bytesOf(entry), 0)

/** Whether two paths lead to one folder, by links or otherwise; one that is not there yet is its path. */
export function isSameFolder(a: string, b: string): boolean {
  const [first, second] = [a, b].map((path) => (existsSync(path) ? realpathSync(path) : resolve(path)))
  return first === second
}

function layout(tensors: Entries): { header: Buffer; order: string[] } {
  const names = [...tensors.keys()].sort((a, b) => {
    const [x, y] = [TO_SAFETENSORS[tensors.get(a)!.dtype], TO_SAFETENSORS[tensors.get(b)!.dtype]]
    return RANK.indexOf(x) - RANK.indexOf(y) || Buffer.compare(Buffer.from(a), Buffer.from(b))
  })
  const entries: [string, unknown][] = [['__metadata__', { format: 'pt' }]]
  let at = 0
  for (const name of names) {
    const tensor = tensors.get(name)!
    const end = at + bytesOf(tensor)
    entries.push([
      name,
      { dtype: TO_SAFETENSORS[tensor.dtype], shape: tensor.shape, data_offsets: [at, end] },
    ])
    at = end
  }
  // not Object.fromEntries: names like '1' would move to the front
  const json = `{${entries.map(([name, entry]) => `${JSON.stringify(name)}:${JSON.stringify(entry)}`).join(',')}}`
  const text = Buffer.from(json)
  const header = Buffer.alloc(8 + Math.ceil(text.length / 8) * 8, ' ')
  header.writeBigUInt64LE(BigInt(header.length - 8))
  text.copy(header, 8)
  return { header, order: names }
}

/** Writes one file. The tensors stay the caller's. */
export async function writeSafetensors(
  path: string,
  tensors: ReadonlyMap<string, Tensor>,
  options: WriteOptions = {},
): Promise<void> {
  await writeEntries(path, entriesOf(tensors), options)
}

/** Writes one file of tensors that are read one after the other. */
export async function writeEntries(
  path: string,
  entries: Entries,
  options: WriteOptions = {},
): Promise<void> {
  await replaceFiles(dirname(path), (files) =>
    addSafetensors(files, basename(path), entries, options, { written: 0, total: totalOf(entries) }),
  )
}

async function addSafetensors(
  files: Replacement,
  name: string,
  entries: Entries,
  options: WriteOptions,
  progress: Progress,
): Promise<void> {
  const { header, order } = layout(entries)
  await files.write(name, async (file) => {
    await writeAll(file, header)
    for (const tensor of order) {
      options.signal?.throwIfAborted()
      const entry = entries.get(tensor)!
      const read = await entry.read()
      const data = await read.data().finally(() => read.dispose())
      if (read.dtype !== entry.dtype || data.byteLength !== bytesOf(entry)) {
        throw new HalfbyteError(
          'ERR_HALFBYTE_USAGE',
          `${name}: ${tensor} has become ${read.dtype} [${read.shape.join(', ')}] while it was saved. ` +
            'What was there before is untouched',
        )
      }
      await writeAll(file, data)
      progress.written += data.byteLength
      options.onProgress?.({ writtenBytes: progress.written, totalBytes: progress.total, tensor })
    }
  })
}

async function writeAll(
  file: FileHandle,
  { buffer, byteOffset, byteLength }: ArrayBufferView,
): Promise<void> {
  for (let at = 0; at < byteLength;) {
    // Node 20 has no Uint8Array of all the bytes where these are 4 GiB or more
    const piece = new Uint8Array(buffer, byteOffset + at, Math.min(byteLength - at, 1 << 30))
    const { bytesWritten } = await file.write(piece)
    at += bytesWritten
  }
}

/** Bytes of '5GB', '200MB', '1GiB', ... or of a number. */
export function parseSize(size: number | string): number {
  if (typeof size === 'number' && Number.isSafeInteger(size) && size > 0) return size
  const match = /^(\d+(?:\.\d+)?)\s*([KMGT])(i?)B$/i.exec(String(size).trim())
  if (!match) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_VALUE',
      `${JSON.stringify(size)} is not a size; give bytes, or a text like '5GB' or '200MiB'`,
    )
  }
  const power = 'KMGT'.indexOf(match[2]!.toUpperCase()) + 1
  return Math.floor(Number(match[1]) * (match[3] ? 1024 : 1000) ** power)
}

/** Tensors in the order given, cut into shards of at most `limit` bytes; a larger tensor gets one of its own. */
function shardNames(tensors: Entries, limit: number): string[][] {
  const shards: string[][] = [[]]
  let bytes = 0
  for (const [name, tensor] of tensors) {
    if (bytes > 0 && bytes + bytesOf(tensor) > limit) {
      shards.push([])
      bytes = 0
    }
    shards.at(-1)!.push(name)
    bytes += bytesOf(tensor)
  }
  return shards
}

/** A state dict without repetitions: of names that share one tensor the first. */
function withoutTies(state: Entries): Entries {
  const seen = new Set<unknown>()
  return new Map([...state].filter(([, { key }]) => !seen.has(key) && seen.add(key)))
}

/**
 * Writes a state dict into a folder: model.safetensors, or shards of at most `maxShardSize` with their index. Weight
 * files of an older save that are not part of this one go, last of all. When it fails, the older save is whole.
 */
export async function saveStateDict(
  folder: string,
  state: ReadonlyMap<string, Tensor>,
  options: WriteOptions & { maxShardSize?: number | string | undefined } = {},
): Promise<string[]> {
  const limit = parseSize(options.maxShardSize ?? DEFAULT_SHARD_SIZE)
  await makeFolder(folder)
  let names: string[] = []
  await replaceFiles(folder, async (files) => {
    names = await addStateDict(files, folder, entriesOf(state), { ...options, maxShardSize: limit })
  })
  return names
}

/** The same as part of a larger replacement; returns the names of the weight files. */
export async function addStateDict(
  files: Replacement,
  folder: string,
  state: Entries,
  options: WriteOptions & { maxShardSize: number },
): Promise<string[]> {
  const tensors = withoutTies(state)
  const total = totalOf(tensors)
  const shards = shardNames(tensors, options.maxShardSize)
  const digits = (n: number) => String(n).padStart(5, '0')
  const names = shards.map((_, i) =>
    shards.length === 1 ? SINGLE_FILE : `model-${digits(i + 1)}-of-${digits(shards.length)}.safetensors`,
  )
  const progress = { written: 0, total }
  for (const [i, shard] of shards.entries()) {
    const part = new Map(shard.map((name) => [name, tensors.get(name)!]))
    await addSafetensors(files, names[i]!, part, options, progress)
  }
  if (shards.length > 1) {
    const map = shards.flatMap((shard, i) => shard.map((name) => [name, names[i]!] as const))
    map.sort(([a], [b]) => (a < b ? -1 : 1))
    const metadata = { total_parameters: options.totalParameters, total_size: total }
    await addJson(files, INDEX_FILE, { metadata, weight_map: Object.fromEntries(map) })
  } else {
    files.remove(INDEX_FILE)
  }
  const present = await readdir(folder).catch((cause: unknown) => {
    throw writeError(folder, cause)
  })
  for (const name of present) {
    if (/^model(-\d{5}-of-\d{5})?\.safetensors$/.test(name) && !names.includes(name)) files.remove(name)
  }
  return names
}

export async function addJson(files: Replacement, name: string, value: unknown): Promise<void> {
  await files.write(name, (file) => writeAll(file, Buffer.from(`${jsonText(value)}\n`)))
}

/** A file of another place, as it is. */
export async function addCopy(files: Replacement, name: string, from: string): Promise<void> {
  await files.write(name, async (file) => writeAll(file, await readFile(from)))
}
