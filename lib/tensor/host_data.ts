/** Reading what a caller gives as the elements of a tensor. */
import { HalfbyteError } from '../errors.js'
import { checkDType, DTYPES, isArrayOf, type DType, type TypedArray } from './dtype.js'
import { checkLengths, sizeOf, type Shape } from './shape.js'

export type Nested = number | boolean | readonly Nested[]

/** The dtype that a typed array stands for by itself. */
function dtypeOf(data: ArrayBufferView): DType {
  if (isArrayOf('float16', data)) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_DTYPE',
      'Tensor.from: a Uint16Array needs dtype float16 or bfloat16',
    )
  }
  for (const name of Object.keys(DTYPES) as DType[]) if (isArrayOf(name, data)) return name
  throw new HalfbyteError(
    'ERR_HALFBYTE_DTYPE',
    `Tensor.from: cannot read a ${(data as object).constructor.name}`,
  )
}

/** Dtype and shape of the tensor that a typed array gives: as wanted, else a vector of the array's own. */
export function readArray(
  data: TypedArray,
  wanted: { dtype?: DType; shape?: Shape },
): { dtype: DType; shape: Shape } {
  const dtype = wanted.dtype ?? dtypeOf(data)
  const { array } = DTYPES[checkDType(dtype, 'Tensor.from')]
  if (!isArrayOf(dtype, data)) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_DTYPE',
      `Tensor.from: ${dtype} is read from a ${array.name}, not from a ${(data as object).constructor.name}`,
    )
  }
  checkLengths(wanted.shape ?? [data.length], 'Tensor.from')
  const shape = [...(wanted.shape ?? [data.length])]
  if (sizeOf(shape) !== data.length) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_SHAPE',
      `Tensor.from: shape [${shape.join(', ')}] has ${sizeOf(shape)} elements, the array ${data.length}`,
    )
  }
  return { dtype, shape }
}

/** Whether the lists of each level are as long as the first of them. */
function isRegular(data: Nested, shape: Shape, level = 0): boolean {
  if (level === shape.length) return !Array.isArray(data)
  return (
    Array.isArray(data) &&
    data.length === shape[level] &&
    (data as readonly Nested[]).every((part) => isRegular(part, shape, level + 1))
  )
}

/** Numbers, nested to give the shape, as an array for a tensor of `dtype`; as float32 where that is a 16-bit float. */
export function readNested(data: Nested, dtype: DType): { array: TypedArray; shape: Shape } {
  const shape: number[] = []
  for (let level: Nested = data; Array.isArray(level); level = level[0] as Nested) {
    shape.push(level.length)
    if (level.length === 0) break
  }
  const flat = (Array.isArray(data) ? data.flat(Infinity) : [data]) as number[]
  const isNumber = (x: unknown) => typeof x === 'number' || typeof x === 'boolean'
  if (flat.length !== sizeOf(shape) || !isRegular(data, shape) || !flat.every(isNumber)) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_SHAPE',
      'Tensor.from: the nested arrays are ragged or hold other than numbers',
    )
  }
  const odd = DTYPES[checkDType(dtype, 'Tensor.from')].isFloat
    ? undefined
    : flat.find((x) => !Number.isFinite(Number(x)))
  if (odd !== undefined)
    throw new HalfbyteError('ERR_HALFBYTE_VALUE', `Tensor.from: ${dtype} has no value for ${odd}`)
  if (dtype === 'int64') {
    return { array: BigInt64Array.from(flat, (x) => BigInt(Math.trunc(Number(x)))), shape }
  }
  if (dtype === 'float32' || dtype === 'float16' || dtype === 'bfloat16') {
    return { array: Float32Array.from(flat, Number), shape }
  }
  const integers = { int8: Int8Array, uint8: Uint8Array, int32: Int32Array }[dtype]
  return { array: new integers(flat.map(Number)), shape }
}
