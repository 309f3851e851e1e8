import { needsGrad, record, type Gradient } from '../autograd.js'
import type { DType } from '../dtype.js'
import { Tensor } from '../tensor.js'
import {
  call,
  checkContiguous,
  checkDTypes,
  checkFloat,
  checkSameDType,
  checkShape,
  fail,
  rowsAndCols,
  show,
  withContiguous,
} from './call.js'
import { ACTIVATIONS, type Activation } from './elementwise.js'
import {
  checkThreshold,
  dequantizeBlocks4,
  int8DequantizeRows,
  packedOperands,
  packedTensors,
  type Packed4,
} from './quantize.js'
import { sumTo } from './reduce.js'

export interface LinearOptions {
  /** float [N]. */
  bias?: Tensor | undefined
  /** Added to the result; its shape and dtype. */
  residual?: Tensor | undefined
}

function run(
  op: string,
  x: Tensor,
  n: number,
  k: number,
  o: LinearOptions,
  weight: (Tensor | undefined)[],
  scalars: number[],
): Tensor {
  checkFloat(op, 'x', x)
  if (x.shape.at(-1) !== k)
    fail(op, `x ${show(x.shape)} does not end in the ${k} input features of the weight [${n}, ${k}]`)
  const shape = [...x.shape.slice(0, -1), n]
  if (o.bias) {
    checkFloat(op, 'bias', o.bias)
    checkShape(op, 'bias', o.bias, [n])
  }
  if (o.residual) {
    checkSameDType(op, x, o.residual)
    checkShape(op, 'residual', o.residual, shape)
  }
  const { bias, residual } = o
  return withContiguous([x, ...(bias ? [bias] : []), ...(residual ? [residual] : [])], (input, ...added) => {
    const y = Tensor.empty(shape, x.dtype, x.device)
    const b = bias && added.shift()
    call(op, [y], [input, b, added[0], ...weight], scalars)
    return y
  })
}

/** A tensor as rows of its last dimension. */
const asRows = (t: Tensor): Tensor => t.reshape(...rowsAndCols(t))

/**
 * Gradients of y = x W^T + bias + residual: dy W, with W [N, K] as `weightOf` makes it of what was saved, preferably in
 * dy's dtype; the sum of the rows of dy; dy itself.
 */
function gradients(
  x: Tensor,
  saved: readonly Tensor[],
  weightOf: (saved: Tensor[], dtype: DType) => Tensor,
  { bias, residual }: LinearOptions,
): Gradient[] {
  const { shape } = x
  const biasDtype = bias?.dtype
  return [
    {
      of: x,
      from: saved,
      by: (dy, ...parts) => linear(asRows(dy), weightOf(parts, dy.dtype).transpose(0, 1)).reshape(...shape),
    },
    {
      of: bias,
      by: (dy) => {
        const rows = asRows(widened(dy, biasDtype!))
        return sumTo(rows, [1, rows.shape[1]!]).reshape(-1).to(biasDtype!)
      },
    },
    { of: residual, by: (dy) => dy },
  ]
}

/** A gradient in the dtype that sums of it are to have, where that is the wider one. */
const widened = (dy: Tensor, dtype: DType): Tensor => (dtype === 'float32' ? dy.to(dtype) : dy)

/** dW = dy^T x, of a float weight. */
function weightGradient(weight: Tensor, x: Tensor): Gradient {
  const { dtype } = weight
  return {
    of: weight,
    from: [x],
    by: (dy, input) =>
      linear(asRows(widened(dy, dtype)).transpose(0, 1), asRows(input).transpose(0, 1)).to(dtype),
  }
}

/** y [..., N] = x [..., K] weight [N, K]^T + bias + residual; weight of any float dtype, y of x's. */
export function linear(x: Tensor, weight: Tensor, options: LinearOptions = {}): Tensor {
  checkFloat('linear', 'weight', weight)
  if (weight.ndim !== 2) fail('linear', `the weight is ${show(weight.shape)}, it must be [N, K]`)
  const forward = () =>
    withContiguous([weight], (w) => run('linear', x, weight.shape[0]!, weight.shape[1]!, options, [w], []))
  if (!needsGrad(x, weight, options.bias, options.residual)) return forward()
  return record('linear', forward, [
    ...gradients(x, [weight], ([w]) => w!, options),
    weightGradient(weight, x),
  ])
}

/** The same with a 4-bit weight: exact to the rounding of x's dtype against the dequantised weight. */
export function linear4bit(x: Tensor, weight: Packed4, options: LinearOptions = {}): Tensor {
  const { inputs, scalars } = packedOperands('linear4bit', weight)
  const forward = () => run('linear_4bit', x, weight.n, weight.k, options, inputs, scalars)
  if (!needsGrad(x, options.bias, options.residual)) return forward()
  const [saved, packed] = packedTensors(weight)
  return record(
    'linear4bit',
    forward,
    gradients(x, saved, (parts, dtype) => dequantizeBlocks4(packed(parts), dtype), options),
    saved,
  )
}

/** Most weights that linear4bitGroup() takes: q, k and v. */
const MAX_GROUP = 3

/** Inputs and scalars of weights that take the same x; `count` places, the empty ones last. */
function groupOperands(
  op: string,
  x: Tensor,
  weights: readonly Packed4[],
  biases: readonly (Tensor | undefined)[],
  count: number,
): { inputs: (Tensor | undefined)[]; scalars: number[] } {
  checkFloat(op, 'x', x)
  const inputs: (Tensor | undefined)[] = []
  const scalars: number[] = []
  for (let i = 0; i < count; i++) {
    const weight = weights[i]
    if (!weight) {
      inputs.push(...Array.from({ length: 6 }, () => undefined))
      scalars.push(-1, 0, 0, 0, 0)
      continue
    }
    if (x.shape.at(-1) !== weight.k) {
      fail(
        op,
        `x ${show(x.shape)} does not end in the input features of weight ${i} [${weight.n}, ${weight.k}]`,
      )
    }
    const bias = biases[i]
    if (bias) {
      checkFloat(op, 'bias', bias)
      checkShape(op, 'bias', bias, [weight.n])
      checkContiguous(op, 'bias', bias)
    }
    const packed = packedOperands(op, weight)
    inputs.push(bias, ...packed.inputs)
    scalars.push(...packed.scalars)
  }
  return { inputs, scalars }
}

/** linear4bit() of one x with one to three weights, in as few passes over x as the device can: q, k and v. */
export function linear4bitGroup(
  x: Tensor,
  weights: readonly Packed4[],
  biases: readonly (Tensor | undefined)[] = [],
): Tensor[] {
  if (weights.length < 1 || weights.length > MAX_GROUP)
    fail('linear4bitGroup', `${weights.length} weights; it takes one to ${MAX_GROUP}`)
  const { inputs, scalars } = groupOperands('linear4bitGroup', x, weights, biases, MAX_GROUP)
  return withContiguous([x], (input) => {
    const results = weights.map(({ n }) => Tensor.empty([...x.shape.slice(0, -1), n], x.dtype, x.device))
    const [a, b, c] = results
    call('linear_4bit_group', [a, b, c], [input, ...inputs], scalars)
    return results
  })
}

/** activation(x gate^T + gateBias) * (x up^T + upBias), the first half of a gated MLP; gate and up of one shape. */
export function linear4bitGated(
  x: Tensor,
  gate: Packed4,
  up: Packed4,
  activation: Activation,
  biases: readonly (Tensor | undefined)[] = [],
): Tensor {
  if (gate.n !== up.n) fail('linear4bitGated', `gate has ${gate.n} output features, up ${up.n}`)
  const { inputs, scalars } = groupOperands('linear4bitGated', x, [gate, up], biases, 2)
  return withContiguous([x], (input) => {
    const y = Tensor.empty([...x.shape.slice(0, -1), gate.n], x.dtype, x.device)
    call('linear_4bit_gated', [y], [input, ...inputs], [...scalars, ACTIVATIONS[activation]])
    return y
  })
}

/**
 * The LLM.int8() forward (arXiv 2208.07339): weight int8 [N, K] with row absmax scb float32 [N]. Columns of x with an
 * element of at least `threshold` are multiplied in x's precision; 0 turns that off. bnbExact reproduces bitsandbytes'
 * float16 roundings. `source`: the float [N, K] that the codes were made from, to which gradients of the weight go, as if
 * it had not been rounded: dy^T x. (bitsandbytes rounds dy and x to int8 there, and mixes rows up: docs/modules.md.)
 */
export function linear8bit(
  x: Tensor,
  weight: Tensor,
  scb: Tensor,
  options: LinearOptions & { threshold?: number; bnbExact?: boolean; source?: Tensor | undefined } = {},
): Tensor {
  checkDTypes('linear8bit', 'weight', weight, 'int8')
  if (weight.ndim !== 2) fail('linear8bit', `the weight is ${show(weight.shape)}, it must be [N, K]`)
  checkDTypes('linear8bit', 'scb', scb, 'float32')
  checkShape('linear8bit', 'scb', scb, [weight.shape[0]!])
  const threshold = options.threshold ?? 0
  checkThreshold('linear8bit', threshold)
  const [n, k] = weight.shape as [number, number]
  const { source } = options
  if (source) {
    checkFloat('linear8bit', 'source', source)
    checkShape('linear8bit', 'source', source, [n, k])
  }
  const forward = () =>
    withContiguous([weight, scb], (codes, stats) =>
      run('linear_8bit', x, n, k, options, [codes, stats], [threshold, options.bnbExact ? 1 : 0]),
    )
  if (!needsGrad(x, source, options.bias, options.residual)) return forward()
  const learnt = [
    ...gradients(
      x,
      [weight, scb],
      ([codes, stats], dtype) => int8DequantizeRows(codes!, stats!, dtype),
      options,
    ),
    ...(source ? [weightGradient(source, x)] : []),
  ]
  return record('linear8bit', forward, learnt, [scb])
}
