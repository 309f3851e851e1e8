/** Reading what a caller gives as the elements of a tensor. */
import { HalfbyteError } from '../errors.js'
import type { Device } from './device.js'
import { checkDType, DTYPES, isArrayOf, type DType } from './dtype.js'
import { sizeOf, Tensor, type TensorOptions } from './tensor.js'

export type Nested = number | boolean | readonly Nested[]

/** The dtype that a typed array stands for by itself. */
export function dtypeOf(data: ArrayBufferView): DType {
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

/** Numbers, nested to give the shape. */
export function fromNested(data: Nested, options: TensorOptions, target: Device): Tensor {
  const shape: number[] = []
  for (let level: Nested = data; Array.isArray(level); level = level[0] as Nested) {
    shape.push(level.length)
    if (level.length === 0) break
  }
  const flat = (Array.isArray(data) ? data.flat(Infinity) : [data]) as number[]
  if (flat.length !== sizeOf(shape) || flat.some((x) => typeof x !== 'number' && typeof x !== 'boolean')) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_SHAPE',
      'Tensor.from: the nested arrays are ragged or hold other than numbers',
    )
  }
  const dtype = options.dtype ?? 'float32'
  const final = options.shape ?? shape
  if (dtype === 'int64') {
    const integers = BigInt64Array.from(flat, (x) => BigInt(Math.trunc(Number(x))))
    return Tensor.from(integers, { dtype, shape: final, device: target })
  }
  if (dtype === 'float32' || dtype === 'float16' || dtype === 'bfloat16') {
    const single = Tensor.from(Float32Array.from(flat, Number), { shape: final, device: target })
    if (dtype === 'float32') return single
    const converted = single.to(dtype)
    single.dispose()
    return converted
  }
  const array = { int8: Int8Array, uint8: Uint8Array, int32: Int32Array }[dtype]
  if (!array) checkDType(dtype, 'Tensor.from')
  return Tensor.from(new array(flat.map(Number)), { shape: final, device: target })
}
