/** Arithmetic and activations, element by element. */
import { needsGrad, record, type Gradient } from '../autograd.js'
import type { Shape } from '../shape.js'
import { Tensor } from '../tensor.js'
import {
  call,
  checkDistinct,
  checkDTypes,
  checkFloat,
  checkSameDType,
  checkShape,
  fail,
  sameShape,
  show,
  withContiguous,
} from './call.js'
import { withApart } from './overlap.js'
import { sumTo } from './reduce.js'

function broadcastShape(op: string, a: Shape, b: Shape): Shape {
  if (sameShape(a, b)) return a
  const ndim = Math.max(a.length, b.length)
  return Array.from({ length: ndim }, (_, i) => {
    const m = a[i - ndim + a.length] ?? 1
    const n = b[i - ndim + b.length] ?? 1
    if (m !== n && m !== 1 && n !== 1) fail(op, `${show(a)} and ${show(b)} do not broadcast`)
    return m === 1 ? n : m
  })
}

const BINARY = { add: 0, sub: 1, mul: 2, div: 3, min: 4, max: 5 } as const

function binary(op: keyof typeof BINARY, a: Tensor, b: Tensor | number): Tensor {
  checkDTypes(op, 'a', a, 'float32', 'float16', 'bfloat16', 'int32')
  const other = typeof b === 'number' ? Tensor.full([], b, a.dtype, a.device) : b
  checkSameDType(op, a, other)
  const shape = broadcastShape(op, a.shape, other.shape)
  const forward = () => {
    const left = sameShape(a.shape, shape) ? a : a.expand(...shape)
    const right = sameShape(other.shape, shape) ? other : other.expand(...shape)
    try {
      const y = Tensor.empty(shape, a.dtype, a.device)
      call('binary', [y], [left, right], [BINARY[op]])
      return y
    } finally {
      if (left !== a) left.dispose()
      if (right !== other) right.dispose()
    }
  }
  try {
    const gradients = needsGrad(a, other) ? binaryGradients(op, a, other) : undefined
    return gradients ? record(op, forward, gradients) : forward()
  } finally {
    if (other !== b) other.dispose()
  }
}

/** min and max have none here. */
function binaryGradients(op: keyof typeof BINARY, a: Tensor, b: Tensor): Gradient[] | undefined {
  const [left, right] = [a.shape, b.shape]
  switch (op) {
    case 'add':
      return [
        { of: a, by: (dy) => sumTo(dy, left) },
        { of: b, by: (dy) => sumTo(dy, right) },
      ]
    case 'sub':
      return [
        { of: a, by: (dy) => sumTo(dy, left) },
        { of: b, by: (dy) => activation(sumTo(dy, right), 'neg') },
      ]
    case 'mul':
      return [
        { of: a, from: [b], by: (dy, y) => sumTo(mul(dy, y), left) },
        { of: b, from: [a], by: (dy, x) => sumTo(mul(dy, x), right) },
      ]
    case 'div':
      return [
        { of: a, from: [b], by: (dy, y) => sumTo(div(dy, y), left) },
        // a / b falls by a / b^2
        {
          of: b,
          from: [a, b],
          by: (dy, x, y) => activation(sumTo(mul(dy, div(div(x, y), y)), right), 'neg'),
        },
      ]
    default:
      return undefined
  }
}

/** Elementwise with numpy's broadcasting; float or int32, both of one dtype; `b` may be a number. */
export const add = (a: Tensor, b: Tensor | number): Tensor => binary('add', a, b)
export const sub = (a: Tensor, b: Tensor | number): Tensor => binary('sub', a, b)
export const mul = (a: Tensor, b: Tensor | number): Tensor => binary('mul', a, b)
export const div = (a: Tensor, b: Tensor | number): Tensor => binary('div', a, b)
export const minimum = (a: Tensor, b: Tensor | number): Tensor => binary('min', a, b)
export const maximum = (a: Tensor, b: Tensor | number): Tensor => binary('max', a, b)

/** a += b in place; for counters that live on the device. */
export function addInto(a: Tensor, b: Tensor): Tensor {
  checkSameDType('addInto', a, b)
  checkDistinct('addInto', a)
  const right = b.expand(...a.shape)
  try {
    withApart(a, right, (from) => call('binary', [a], [a, from], [BINARY.add]))
    return a
  } finally {
    right.dispose()
  }
}

export const ACTIVATIONS = {
  none: 0,
  silu: 1,
  gelu: 2,
  gelu_tanh: 3,
  relu: 4,
  sigmoid: 5,
  tanh: 6,
  exp: 7,
  neg: 8,
} as const
export type Activation = keyof typeof ACTIVATIONS

/** act(x), float. */
export function activation(x: Tensor, act: Activation): Tensor {
  checkFloat('activation', 'x', x)
  return withContiguous([x], (input) => {
    const y = Tensor.empty(x.shape, x.dtype, x.device)
    call('activation', [y], [input], [ACTIVATIONS[act]])
    return y
  })
}

/** act(gate) * up, float [M, N]; the rows of gate and up may be strided (halves of one product). */
export function gatedActivation(gate: Tensor, up: Tensor, act: Activation): Tensor {
  checkFloat('gatedActivation', 'gate', gate)
  checkSameDType('gatedActivation', gate, up)
  checkShape('gatedActivation', 'up', up, gate.shape)
  const y = Tensor.empty(gate.shape, gate.dtype, gate.device)
  // rows of one element, which may lie apart, are none
  if (gate.ndim === 2 && gate.shape[1] !== 1 && gate.strides[1] === 1 && up.strides[1] === 1) {
    call('gated_activation', [y], [gate, up], [ACTIVATIONS[act]])
    return y
  }
  return withContiguous([gate, up], (g, u) => {
    const rows: [number, number] = [gate.size / (gate.shape.at(-1) || 1), gate.shape.at(-1) ?? 1]
    const [gr, ur, yr] = [g.reshape(...rows), u.reshape(...rows), y.reshape(...rows)]
    call('gated_activation', [yr], [gr, ur], [ACTIVATIONS[act]])
    for (const t of [gr, ur, yr]) t.dispose()
    return y
  })
}
