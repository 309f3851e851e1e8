/** Filling, copying, joining and picking out elements, which stay as they are. */
import { needsGrad, record } from '../autograd.js'
import { Tensor } from '../tensor.js'
import {
  call,
  checkDistinct,
  checkDTypes,
  checkFloat,
  checkSameDType,
  checkTensor,
  fail,
  sameShape,
  show,
  withContiguous,
} from './call.js'
import { withApart } from './overlap.js'

/** y[...] = value. */
export function fillInto(y: Tensor, value: number): Tensor {
  checkTensor('fill', 'y', y)
  call('fill', [y], [], [value])
  return y
}

/** y[...] = x[...] converted to y's dtype; one shape, any strides. They may be parts of one tensor. */
export function copyInto(y: Tensor, x: Tensor): Tensor {
  checkTensor('copy', 'y', y)
  checkTensor('copy', 'x', x)
  checkDistinct('copy', y)
  if (!sameShape(y.shape, x.shape)) fail('copy', `from ${show(x.shape)} into ${show(y.shape)}`)
  withApart(y, x, (from) => call('copy', [y], [from]))
  return y
}

/** Rows of a float table [V, D] by int32 or int64 ids of any shape: [...ids.shape, D]. Ids out of range give NaN. */
export function gatherRows(table: Tensor, ids: Tensor): Tensor {
  checkDTypes('gatherRows', 'ids', ids, 'int32', 'int64')
  checkFloat('gatherRows', 'table', table)
  if (table.ndim !== 2) fail('gatherRows', `the table is ${show(table.shape)}, it must be [V, D]`)
  return withContiguous([table, ids], (t, i) => {
    const y = Tensor.empty([...ids.shape, table.shape[1]!], table.dtype, table.device)
    call('gather_rows', [y], [t, i])
    return y
  })
}

/** Joins tensors of one dtype along a dimension. */
export function concat(tensors: readonly Tensor[], dim = 0): Tensor {
  if (tensors.length === 0) fail('concat', 'no tensors')
  const first = tensors[0]!
  checkTensor('concat', 'an operand', first)
  const d = dim < 0 ? dim + first.ndim : dim
  if (!Number.isInteger(d) || d < 0 || d >= first.ndim)
    fail('concat', `${first.toString()} has no dimension ${String(dim)}`)
  for (const t of tensors) {
    checkSameDType('concat', first, t)
    if (t.ndim !== first.ndim || !sameShape(t.shape.with(d, 0), first.shape.with(d, 0))) {
      fail('concat', `${show(t.shape)} and ${show(first.shape)} along dimension ${d}`)
    }
  }
  let length = 0
  const begins = tensors.map((t) => (length += t.shape[d]!) - t.shape[d]!)
  const place = (whole: Tensor, i: number) => whole.slice(d, begins[i]!, begins[i + 1] ?? length)
  const forward = () => {
    const y = Tensor.empty(first.shape.with(d, length), first.dtype, first.device)
    for (const [i, t] of tensors.entries()) {
      const part = place(y, i)
      copyInto(part, t)
      part.dispose()
    }
    return y
  }
  if (!needsGrad(...tensors)) return forward()
  return record(
    'concat',
    forward,
    tensors.map((of, i) => ({ of, by: (dy) => place(dy, i) })),
  )
}
