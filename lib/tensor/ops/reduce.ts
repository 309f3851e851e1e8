import { needsGrad, record } from '../autograd.js'
import { sizeOf, type Shape } from '../shape.js'
import { Tensor } from '../tensor.js'
import { tidy } from '../tidy.js'
import { call, checkDTypes, checkFloat, sameShape, withContiguous } from './call.js'
import { div } from './elementwise.js'
import { concat } from './layout.js'
import { linear } from './linear.js'

/** Mean of all elements of a float32 tensor, as a float32 [1]; summed in double. */
export function mean(x: Tensor): Tensor {
  checkDTypes('mean', 'x', x, 'float32')
  const forward = () =>
    withContiguous([x], (input) => {
      const y = Tensor.empty([1], 'float32', x.device)
      call('mean', [y], [input])
      return y
    })
  if (!needsGrad(x)) return forward()
  const { shape, size } = x
  const ones = shape.map(() => 1)
  return record('mean', forward, [
    {
      of: x,
      by: (dy) =>
        div(dy, size)
          .reshape(...ones)
          .expand(...shape),
    },
  ])
}

/** Number of NaN and infinite elements of a float tensor, as an int32 [1]. */
export function countNonfinite(x: Tensor): Tensor {
  checkFloat('countNonfinite', 'x', x)
  return withContiguous([x], (input) => {
    const y = Tensor.empty([1], 'int32', x.device)
    call('count_nonfinite', [y], [input])
    return y
  })
}

/** The sum of the dimensions of x that a tensor of `shape` was repeated along; x itself when there are none. */
export function sumTo(x: Tensor, shape: Shape): Tensor {
  if (sameShape(x.shape, shape)) return x
  const lead = x.ndim - shape.length
  const dims = x.shape.map((_, d) => d)
  const summed = dims.filter((d) => d < lead || (shape[d - lead] === 1 && x.shape[d] !== 1))
  const kept = dims.filter((d) => !summed.includes(d))
  const length = summed.reduce((product, d) => product * x.shape[d]!, 1)
  return tidy(() => sumRows(x.permute(...kept, ...summed).reshape(sizeOf(shape), length)).reshape(...shape))
}

/** Elements that are added up one after the other. */
const RUN = 1024

/** [n, 1] of [n, length]: in float32 on every device, by products with ones; long rows by runs, whose sums are added. */
function sumRows(rows: Tensor): Tensor {
  const [n, length] = rows.shape as [number, number]
  const sum = (part: Tensor) => linear(part, Tensor.full([1, part.shape[1]!], 1, part.dtype, part.device))
  if (length <= RUN) return sum(rows)
  const wide = rows.to('float32')
  const whole = length - (length % RUN)
  const runs = sum(wide.slice(1, 0, whole).reshape((n * whole) / RUN, RUN)).reshape(n, whole / RUN)
  const parts = whole < length ? concat([runs, sum(wide.slice(1, whole, length))], 1) : runs
  return sumRows(parts).to(rows.dtype)
}
