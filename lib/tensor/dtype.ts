import { HalfbyteError } from '../errors.js'

export type DType = 'float32' | 'float16' | 'bfloat16' | 'int8' | 'uint8' | 'int32' | 'int64'

/** What `data()` gives and `Tensor.from()` takes: 16-bit floats travel as their raw bits. */
export type TypedArray = Float32Array | Uint16Array | Int8Array | Uint8Array | Int32Array | BigInt64Array

interface DTypeInfo {
  /** The number by which the addon knows the dtype. */
  readonly id: number
  readonly bytes: number
  readonly isFloat: boolean
  readonly array: new (buffer: ArrayBuffer, byteOffset?: number, length?: number) => TypedArray
}

export const DTYPES: { readonly [name in DType]: DTypeInfo } = {
  float32: { id: 0, bytes: 4, isFloat: true, array: Float32Array },
  float16: { id: 1, bytes: 2, isFloat: true, array: Uint16Array },
  bfloat16: { id: 2, bytes: 2, isFloat: true, array: Uint16Array },
  int8: { id: 3, bytes: 1, isFloat: false, array: Int8Array },
  uint8: { id: 4, bytes: 1, isFloat: false, array: Uint8Array },
  int32: { id: 5, bytes: 4, isFloat: false, array: Int32Array },
  int64: { id: 6, bytes: 8, isFloat: false, array: BigInt64Array },
}

/** Throws ERR_HALFBYTE_DTYPE for anything that is not a dtype's name. */
export function checkDType(name: unknown, where: string): DType {
  if (typeof name === 'string' && Object.hasOwn(DTYPES, name)) return name as DType
  throw new HalfbyteError(
    'ERR_HALFBYTE_DTYPE',
    `${where}: unknown dtype ${JSON.stringify(name)}; the dtypes are ${Object.keys(DTYPES).join(', ')}`,
  )
}

/** Whether `data` is a typed array of this dtype's elements, made in whatever realm. */
export function isArrayOf(dtype: DType, data: unknown): data is TypedArray {
  return (
    ArrayBuffer.isView(data) &&
    Object.prototype.toString.call(data) === `[object ${DTYPES[dtype].array.name}]`
  )
}
