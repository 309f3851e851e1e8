/** Shapes, and the strides of elements that lie one after the other. */
import { HalfbyteError } from '../errors.js'

export type Shape = readonly number[]

export function sizeOf(shape: Shape): number {
  return shape.reduce((product, length) => product * length, 1)
}

export function contiguousStrides(shape: Shape): number[] {
  const strides = new Array<number>(shape.length)
  let stride = 1
  for (let i = shape.length - 1; i >= 0; i--) {
    strides[i] = stride
    stride *= shape[i]!
  }
  return strides
}

export function checkLengths(shape: Shape, where: string): void {
  const given: unknown = shape
  if (!Array.isArray(given)) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_SHAPE',
      `${where}: the shape is ${String(given)}, not a list of lengths such as [2, 3]`,
    )
  }
  const bad = shape.find((n) => !Number.isSafeInteger(n) || n < 0)
  if (bad !== undefined || shape.length > 6 || !Number.isSafeInteger(sizeOf(shape) * 8)) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_SHAPE',
      `${where}: [${shape.join(', ')}] is not a shape (at most 6 dimensions, whole numbers >= 0, less than 2^50 elements)`,
    )
  }
}
