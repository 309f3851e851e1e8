/** Reading and making safetensors files in tests, independent of lib/checkpoint. */
import { readFileSync, writeFileSync } from 'node:fs'

export type Data =
  | Float32Array
  | Float64Array
  | Uint16Array
  | Int16Array
  | Int8Array
  | Uint8Array
  | Int32Array
  | Uint32Array
  | BigInt64Array

export interface Stored {
  dtype: string
  shape: number[]
  data: Data
}

const ARRAYS: Record<string, new (buffer: ArrayBuffer) => Data> = {
  F32: Float32Array,
  F64: Float64Array,
  F16: Uint16Array,
  BF16: Uint16Array,
  I16: Int16Array,
  I8: Int8Array,
  U8: Uint8Array,
  BOOL: Uint8Array,
  I32: Int32Array,
  U32: Uint32Array,
  I64: BigInt64Array,
}

/** Every tensor of a file; 16-bit floats as raw bits. */
export function readSafetensors(path: string): Map<string, Stored> {
  const file = readFileSync(path)
  const start = 8 + Number(file.readBigUInt64LE(0))
  const header = JSON.parse(file.toString('utf8', 8, start)) as Record<
    string,
    { dtype: string; shape: number[]; data_offsets: [number, number] }
  >
  const tensors = new Map<string, Stored>()
  for (const [name, { dtype, shape, data_offsets: offsets }] of Object.entries(header)) {
    if (name === '__metadata__') continue
    // a copy: the data of a tensor need not be aligned in the file
    const bytes = new Uint8Array(file.subarray(start + offsets[0], start + offsets[1]))
    tensors.set(name, { dtype, shape, data: new ARRAYS[dtype]!(bytes.buffer) })
  }
  return tensors
}

/** A file from a header and data as they are, wrong ones too. */
export function rawSafetensors(header: string | object, data: Uint8Array = new Uint8Array(0)): Buffer {
  const json = Buffer.from(typeof header === 'string' ? header : JSON.stringify(header))
  const length = Buffer.alloc(8)
  length.writeBigUInt64LE(BigInt(json.length))
  return Buffer.concat([length, json, data])
}

/** Writes tensors in the given order, one after the other. */
export function writeSafetensors(path: string, tensors: ReadonlyMap<string, Stored>): void {
  const header: Record<string, unknown> = {}
  const parts: Uint8Array[] = []
  let at = 0
  for (const [name, { dtype, shape, data }] of tensors) {
    header[name] = { dtype, shape, data_offsets: [at, at + data.byteLength] }
    parts.push(new Uint8Array(data.buffer, data.byteOffset, data.byteLength))
    at += data.byteLength
  }
  writeFileSync(path, rawSafetensors(header, Buffer.concat(parts)))
}
