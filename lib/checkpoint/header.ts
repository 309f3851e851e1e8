/**
 * The header of a safetensors file, with every check that the format asks for. Layout of the file:
 *
 *   u64 little-endian N | N bytes of JSON, padded with spaces | data
 *   JSON: { name: { dtype, shape, data_offsets: [begin, end) counted from the start of the data }, __metadata__? }
 *
 * The tensors cover the data from its first byte to the file's last without holes or overlaps. Nothing here is
 * believed before it is checked: a header may come from anywhere.
 */
import { HalfbyteError } from '../errors.js'
import { duplicateKey, lfsPointer } from './json.js'

/** Bits of an element, by the format's names of dtypes. */
const DTYPE_BITS: Readonly<Record<string, number>> = {
  BOOL: 8,
  F4: 4,
  F6_E2M3: 6,
  F6_E3M2: 6,
  U8: 8,
  I8: 8,
  F8_E5M2: 8,
  F8_E4M3: 8,
  F8_E8M0: 8,
  F8_E4M3FNUZ: 8,
  F8_E5M2FNUZ: 8,
  I16: 16,
  U16: 16,
  F16: 16,
  BF16: 16,
  I32: 32,
  U32: 32,
  F32: 32,
  C64: 64,
  F64: 64,
  I64: 64,
  U64: 64,
}

/** The longest header that readers of the format accept. */
export const MAX_HEADER_BYTES = 100_000_000

export interface TensorInfo {
  /** The file that holds it. */
  readonly file: string
  readonly name: string
  /** As the format calls it: F32, BF16, U8, ... */
  readonly dtype: string
  readonly shape: readonly number[]
  /** Bytes begin .. end-1 of the file. */
  readonly begin: number
  readonly end: number
}

export interface Header {
  readonly metadata: Readonly<Record<string, string>>
  /** In the order of their data. */
  readonly tensors: ReadonlyMap<string, TensorInfo>
  /** Bytes in front of the data. */
  readonly dataStart: number
}

export function checkpointError(file: string, what: string, cause?: unknown): HalfbyteError {
  return new HalfbyteError(
    'ERR_HALFBYTE_CHECKPOINT',
    `${file}: ${what}`,
    cause === undefined ? undefined : { cause },
  )
}

/** Reads and checks the header of a file of `size` bytes; `read(begin, end)` gives bytes of it. */
export function parseHeader(
  file: string,
  size: number,
  read: (begin: number, end: number) => Uint8Array,
): Header {
  if (size < 8) throw checkpointError(file, `${size} bytes are too few for a safetensors file`)
  const lengthBytes = read(0, 8)
  const announced = new DataView(lengthBytes.buffer, lengthBytes.byteOffset, 8).getBigUint64(0, true)
  if (announced > BigInt(MAX_HEADER_BYTES)) {
    const pointer = lfsPointer(new TextDecoder().decode(read(0, Math.min(size, 64))))
    if (pointer) throw checkpointError(file, pointer)
    throw checkpointError(
      file,
      `the header claims ${announced} bytes, the limit is ${MAX_HEADER_BYTES}; this is not a safetensors file, or a damaged one`,
    )
  }
  const length = Number(announced)
  if (8 + length > size) {
    throw checkpointError(
      file,
      `truncated: the header takes ${8 + length} bytes, the file has ${size}. Download it again`,
    )
  }
  const json = parseJson(file, read(8, 8 + length))
  const dataStart = 8 + length
  const metadata = readMetadata(file, json['__metadata__'])
  const found: TensorInfo[] = []
  for (const [name, entry] of Object.entries(json)) {
    if (name !== '__metadata__') found.push(readEntry(file, name, entry, dataStart))
  }
  found.sort((a, b) => a.begin - b.begin || a.end - b.end)
  checkLayout(file, size, dataStart, found)
  return { metadata, dataStart, tensors: new Map(found.map((info) => [info.name, info])) }
}

function parseJson(file: string, bytes: Uint8Array): Record<string, unknown> {
  if (bytes[0] !== 0x7b)
    throw checkpointError(file, 'the header does not begin with "{"; this is not a safetensors file')
  let text: string
  try {
    text = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes)
  } catch (cause) {
    throw checkpointError(file, 'the header is not UTF-8', cause)
  }
  let json: unknown
  try {
    json = JSON.parse(text)
  } catch (cause) {
    throw checkpointError(file, `the header is not JSON (${(cause as Error).message})`, cause)
  }
  const twice = duplicateKey(text)
  if (twice !== undefined) throw checkpointError(file, `the header has ${JSON.stringify(twice)} twice`)
  return json as Record<string, unknown>
}

function readMetadata(file: string, value: unknown): Record<string, string> {
  if (value === undefined) return {}
  if (!isObject(value) || Object.values(value).some((v) => typeof v !== 'string')) {
    throw checkpointError(file, '__metadata__ in the header must be an object of strings')
  }
  return value as Record<string, string>
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}

function isLength(value: unknown): value is number {
  return Number.isSafeInteger(value) && (value as number) >= 0
}

function readEntry(file: string, name: string, entry: unknown, dataStart: number): TensorInfo {
  const bad = (what: string) => checkpointError(file, `tensor ${JSON.stringify(name)} ${what}`)
  if (!isObject(entry)) throw bad('is not described by an object')
  const { dtype, shape, data_offsets: offsets } = entry
  const extra = Object.keys(entry).find((key) => !['dtype', 'shape', 'data_offsets'].includes(key))
  if (extra !== undefined) throw bad(`has an unknown field ${JSON.stringify(extra)}`)
  if (typeof dtype !== 'string' || !Object.hasOwn(DTYPE_BITS, dtype)) {
    throw bad(
      `has the unknown dtype ${JSON.stringify(dtype)}; the format has ${Object.keys(DTYPE_BITS).join(', ')}`,
    )
  }
  if (!Array.isArray(shape) || !shape.every(isLength)) {
    throw bad(`has the shape ${JSON.stringify(shape)}, which is not an array of whole numbers >= 0`)
  }
  if (!Array.isArray(offsets) || offsets.length !== 2 || !offsets.every(isLength)) {
    throw bad(`has data_offsets ${JSON.stringify(offsets)}, which are not two whole numbers >= 0`)
  }
  const [begin, end] = offsets as [number, number]
  if (begin > end) throw bad(`ends at byte ${end}, before it begins at ${begin}`)
  const bits = shape.reduce((n, length) => n * BigInt(length), BigInt(DTYPE_BITS[dtype]!))
  if (bits > BigInt(Number.MAX_SAFE_INTEGER))
    throw bad(`has the absurd shape [${shape.join(', ')}]: ${bits / 8n} bytes`)
  if (bits % 8n !== 0n)
    throw bad(`of dtype ${dtype} and shape [${shape.join(', ')}] does not fill whole bytes`)
  if (Number(bits / 8n) !== end - begin) {
    throw bad(
      `takes ${bits / 8n} bytes by its dtype ${dtype} and shape [${shape.join(', ')}], ` +
        `but ${end - begin} by its data_offsets [${begin}, ${end}]`,
    )
  }
  if (!Number.isSafeInteger(dataStart + end)) throw bad(`ends at byte ${end}, beyond any file`)
  return { file, name, dtype, shape: shape, begin: dataStart + begin, end: dataStart + end }
}

function checkLayout(file: string, size: number, dataStart: number, sorted: readonly TensorInfo[]): void {
  let at = dataStart
  let before = ''
  for (const { name, begin, end } of sorted) {
    const where = `tensor ${JSON.stringify(name)} begins at byte ${begin - dataStart} of the data`
    if (begin < at)
      throw checkpointError(
        file,
        `${where} and overlaps ${JSON.stringify(before)}, which ends at ${at - dataStart}`,
      )
    if (begin > at)
      throw checkpointError(file, `${where}, which leaves a hole of ${begin - at} bytes before it`)
    at = end
    before = name
  }
  if (at > size) {
    throw checkpointError(
      file,
      `truncated: tensor ${JSON.stringify(before)} ends at byte ${at}, the file has ${size}. Download it again`,
    )
  }
  if (at < size)
    throw checkpointError(file, `${size - at} bytes follow the last tensor, which ends at byte ${at}`)
}
