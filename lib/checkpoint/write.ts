/**
 * Writing safetensors, as Python's writer lays them out: tensors by falling alignment of their dtype, then by name;
 * the header padded to a multiple of 8. A file is written beside its place, flushed to the disk and moved there: what
 * stood there before is whole until the new file is. One tensor at a time is in memory.
 */
import { mkdir, open, readdir, rename, rm, type FileHandle } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { HalfbyteError } from '../errors.js'
import type { DType } from '../tensor/dtype.js'
import type { Tensor } from '../tensor/tensor.js'
import { INDEX_FILE, SINGLE_FILE } from './source.js'

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

export interface WriteOptions {
  signal?: AbortSignal | undefined
  onProgress?: ((progress: { writtenBytes: number; totalBytes: number; tensor: string }) => void) | undefined
}

interface Progress {
  written: number
  total: number
}

/** A failed write as an error that says which file it was about. */
export function writeError(path: string, cause: unknown): unknown {
  const code = (cause as NodeJS.ErrnoException | undefined)?.code
  if (cause instanceof HalfbyteError || code === undefined || !/^E[A-Z]+$/.test(code)) return cause
  const what = code === 'ENOSPC' ? 'the disk is full' : (cause as Error).message
  return new HalfbyteError(
    'ERR_HALFBYTE_IO',
    `${path} was not written: ${what}. What was there before is untouched`,
    {
      cause,
    },
  )
}

/** Writes a file so that it is either there in full or not at all. `fill` writes to the handle. */
export async function writeAtomically(
  path: string,
  fill: (file: FileHandle) => Promise<void>,
): Promise<void> {
  const temporary = `${path}.${process.pid}.tmp`
  try {
    const file = await open(temporary, 'w')
    try {
      await fill(file)
      await file.sync()
    } finally {
      await file.close()
    }
    await rename(temporary, path)
  } catch (error) {
    await rm(temporary, { force: true })
    throw writeError(path, error)
  }
  // the name is on the disk once the folder is
  const folder = await open(dirname(path), 'r')
  await folder.sync().catch(() => {}) // not every file system can
  await folder.close()
}

export function layout(tensors: ReadonlyMap<string, Tensor>): { header: Buffer; order: string[] } {
  const names = [...tensors.keys()].sort((a, b) => {
    const [x, y] = [TO_SAFETENSORS[tensors.get(a)!.dtype], TO_SAFETENSORS[tensors.get(b)!.dtype]]
    return RANK.indexOf(x) - RANK.indexOf(y) || Buffer.compare(Buffer.from(a), Buffer.from(b))
  })
  const entries: [string, unknown][] = [['__metadata__', { format: 'pt' }]]
  let at = 0
  for (const name of names) {
    const tensor = tensors.get(name)!
    const end = at + tensor.nbytes
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
  progress: Progress = { written: 0, total: [...tensors.values()].reduce((sum, t) => sum + t.nbytes, 0) },
): Promise<void> {
  const { header, order } = layout(tensors)
  await writeAtomically(path, async (file) => {
    await writeAll(file, header)
    for (const name of order) {
      options.signal?.throwIfAborted()
      const data = await tensors.get(name)!.data()
      await writeAll(file, new Uint8Array(data.buffer, data.byteOffset, data.byteLength))
      progress.written += data.byteLength
      options.onProgress?.({ writtenBytes: progress.written, totalBytes: progress.total, tensor: name })
    }
  })
}

async function writeAll(file: FileHandle, bytes: Uint8Array): Promise<void> {
  for (let at = 0; at < bytes.length;) {
    const { bytesWritten } = await file.write(bytes, at, Math.min(bytes.length - at, 1 << 30))
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
export function shardNames(tensors: ReadonlyMap<string, Tensor>, limit: number): string[][] {
  const shards: string[][] = [[]]
  let bytes = 0
  for (const [name, tensor] of tensors) {
    if (bytes > 0 && bytes + tensor.nbytes > limit) {
      shards.push([])
      bytes = 0
    }
    shards.at(-1)!.push(name)
    bytes += tensor.nbytes
  }
  return shards
}

/** A state dict without repetitions: of names that share one tensor the first. */
export function withoutTies(state: ReadonlyMap<string, Tensor>): Map<string, Tensor> {
  const seen = new Map<number, Tensor>()
  const unique = new Map<string, Tensor>()
  for (const [name, tensor] of state) {
    const first = tensor.size > 0 ? seen.get(tensor.storageId) : undefined
    if (first && first.offset === tensor.offset && first.size === tensor.size && first.dtype === tensor.dtype)
      continue
    if (!first) seen.set(tensor.storageId, tensor)
    unique.set(name, tensor)
  }
  return unique
}

/**
 * Writes a state dict into a folder: model.safetensors, or shards of at most `maxShardSize` with their index. Weight
 * files of an older save that are not part of this one go, last of all.
 */
export async function saveStateDict(
  folder: string,
  state: ReadonlyMap<string, Tensor>,
  options: WriteOptions & { maxShardSize?: number | string | undefined } = {},
): Promise<string[]> {
  const tensors = withoutTies(state)
  const total = [...tensors.values()].reduce((sum, tensor) => sum + tensor.nbytes, 0)
  const shards = shardNames(tensors, parseSize(options.maxShardSize ?? '50GB'))
  await mkdir(folder, { recursive: true })
  const digits = (n: number) => String(n).padStart(5, '0')
  const files = shards.map((_, i) =>
    shards.length === 1 ? SINGLE_FILE : `model-${digits(i + 1)}-of-${digits(shards.length)}.safetensors`,
  )
  const progress = { written: 0, total }
  for (const [i, names] of shards.entries()) {
    const part = new Map(names.map((name) => [name, tensors.get(name)!]))
    await writeSafetensors(join(folder, files[i]!), part, options, progress)
  }
  const stale = (await readdir(folder)).filter(
    (name) => /^model(-\d{5}-of-\d{5})?\.safetensors$/.test(name) && !files.includes(name),
  )
  if (shards.length > 1) {
    const map = shards.flatMap((names, i) => names.map((name) => [name, files[i]!] as const))
    map.sort(([a], [b]) => (a < b ? -1 : 1))
    const index = { metadata: { total_size: total }, weight_map: Object.fromEntries(map) }
    await writeJson(join(folder, INDEX_FILE), index)
  } else {
    await rm(join(folder, INDEX_FILE), { force: true })
  }
  for (const name of stale) await rm(join(folder, name), { force: true })
  return files
}

export async function writeJson(path: string, value: unknown): Promise<void> {
  await writeAtomically(path, async (file) => {
    await writeAll(file, Buffer.from(`${JSON.stringify(value, null, 2)}\n`))
  })
}
