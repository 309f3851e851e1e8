/** Writing to a tensor what is read from another part of its memory. */
import { DTYPES } from '../dtype.js'
import type { Tensor } from '../tensor.js'
import { sameShape } from './call.js'

/** The bytes of a storage from the first to the last element of a view. */
function rangeOf({ shape, strides, offset, dtype }: Tensor): [number, number] {
  const { bytes } = DTYPES[dtype]
  const last = shape.reduce((sum, length, d) => sum + (length - 1) * strides[d]!, offset)
  return [offset * bytes, (last + 1) * bytes]
}

/** Whether writing to y changes elements of x that are still to be read; not where each is read as it is written. */
function overlaps(y: Tensor, x: Tensor): boolean {
  if (y.size === 0 || x.size === 0 || y.storageId !== x.storageId) return false
  const same = x.dtype === y.dtype && x.offset === y.offset && sameShape(x.strides, y.strides)
  const [[begin, end], [from, to]] = [rangeOf(y), rangeOf(x)]
  return !same && from < end && begin < to
}

/** Calls `write` with x, or with a copy of it where it shares elements with y, which is written to. */
export function withApart<T>(y: Tensor, x: Tensor, write: (x: Tensor) => T): T {
  if (!overlaps(y, x)) return write(x)
  const copy = x.clone()
  try {
    return write(copy)
  } finally {
    copy.dispose()
  }
}
