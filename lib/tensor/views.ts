/** Where the elements of views lie: shapes, strides and offsets in the memory of the tensor that they are taken of. */
import { HalfbyteError } from '../errors.js'
import { DTYPES, type DType } from './dtype.js'
import { checkLengths, contiguousStrides, sizeOf, type Shape } from './shape.js'

export interface Place {
  readonly shape: Shape
  readonly strides: readonly number[]
  /** First element, counted from the start of the storage. */
  readonly offset: number
}

/** A tensor, as far as its views go; its text is for messages. */
interface Viewed extends Place {
  readonly dtype: DType
  readonly isContiguous: boolean
  toString(): string
}

/** A dimension by its number, negative ones counted from the last. */
export function dimensionOf(tensor: Viewed, dim: number): number {
  const ndim = tensor.shape.length
  const d = dim < 0 ? dim + ndim : dim
  if (!Number.isInteger(d) || d < 0 || d >= ndim) {
    throw new HalfbyteError('ERR_HALFBYTE_SHAPE', `${tensor.toString()} has no dimension ${dim}`)
  }
  return d
}

/** The shape that reshape() is asked for. */
export function reshapedTo(tensor: Viewed, lengths: readonly number[]): Shape {
  const size = sizeOf(tensor.shape)
  const known = lengths.filter((n) => n !== -1).reduce((product, n) => product * n, 1)
  const shape = lengths.map((n) => (n === -1 ? (known === 0 ? 0 : size / known) : n))
  checkLengths(shape, `reshape of ${tensor.toString()} to [${lengths.join(', ')}]`)
  if (sizeOf(shape) !== size || lengths.filter((n) => n === -1).length > 1) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_SHAPE',
      `reshape: ${tensor.toString()} does not have the elements of [${lengths.join(', ')}]`,
    )
  }
  return shape
}

/** Elements begin .. end-1 of dimension d. */
export function sliced(tensor: Viewed, d: number, begin: number, end: number): Place {
  const { shape, strides, offset } = tensor
  if (!Number.isInteger(begin) || !Number.isInteger(end) || begin < 0 || end < begin || end > shape[d]!) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_SHAPE',
      `slice: ${begin} .. ${end} is not within dimension ${d} of ${tensor.toString()}`,
    )
  }
  return { shape: shape.with(d, end - begin), strides, offset: offset + begin * strides[d]! }
}

/** `dims`: the dimensions of `order`. */
export function permuted(tensor: Viewed, order: readonly number[]): Place & { dims: number[] } {
  const { shape, strides, offset } = tensor
  const dims = order.map((dim) => dimensionOf(tensor, dim))
  if (new Set(dims).size !== shape.length || dims.length !== shape.length) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_SHAPE',
      `permute: [${order.join(', ')}] does not order ${tensor.toString()}`,
    )
  }
  return { shape: dims.map((d) => shape[d]!), strides: dims.map((d) => strides[d]!), offset, dims }
}

export function expanded(tensor: Viewed, shape: Shape): Place {
  checkLengths(shape, `expand of ${tensor.toString()}`)
  const lead = shape.length - tensor.shape.length
  const refusal = () =>
    new HalfbyteError(
      'ERR_HALFBYTE_SHAPE',
      `expand: ${tensor.toString()} does not expand to [${shape.join(', ')}]`,
    )
  const strides = shape.map((length, i) => {
    const own = tensor.shape[i - lead]
    if (i < lead || (own === 1 && length !== 1)) return 0
    if (own === length) return tensor.strides[i - lead]!
    throw refusal()
  })
  if (lead < 0) throw refusal()
  return { shape, strides, offset: tensor.offset }
}

/** The same bits as elements of another dtype. */
export function bitcastTo(tensor: Viewed, dtype: DType): Place {
  const { shape, strides, offset } = tensor
  const own = DTYPES[tensor.dtype].bytes
  const { bytes } = DTYPES[dtype]
  if (bytes === own) return { shape, strides, offset }
  const last = ((shape.at(-1) ?? 1) * own) / bytes
  const start = (offset * own) / bytes
  if (!tensor.isContiguous || shape.length === 0 || !Number.isInteger(last) || !Number.isInteger(start)) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_DTYPE',
      `bitcast: ${tensor.toString()} does not divide into elements of ${dtype}`,
    )
  }
  const cast = shape.with(-1, last)
  return { shape: cast, strides: contiguousStrides(cast), offset: start }
}
