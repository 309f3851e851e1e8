import { Tensor } from '../tensor.js'
import { call, checkFloat, checkSameDType, checkShape, withContiguous } from './call.js'

export interface NormResult {
  y: Tensor
  /** x + residual, rounded to x's dtype: the stream that goes on. */
  sum: Tensor
}

/**
 * x * rsqrt(mean(x^2) + eps) * (weight + weightOffset) over the last dimension; weight [D] of any float dtype, optional.
 * With a residual the norm is of x + residual, which comes back as `sum`. Source: arXiv 1910.07467.
 */
export function rmsNorm(x: Tensor, weight: Tensor | undefined, eps: number, weightOffset?: number): Tensor
export function rmsNorm(
  x: Tensor,
  weight: Tensor | undefined,
  eps: number,
  weightOffset: number,
  residual: Tensor,
): NormResult
export function rmsNorm(
  x: Tensor,
  weight: Tensor | undefined,
  eps: number,
  weightOffset = 0,
  residual?: Tensor,
): Tensor | NormResult {
  return norm('rms_norm', x, weight, undefined, residual, [eps, weightOffset])
}

/** (x - mean) * rsqrt(var + eps) * weight + bias over the last dimension; weight and bias [D], both optional. */
export function layerNorm(
  x: Tensor,
  weight: Tensor | undefined,
  bias: Tensor | undefined,
  eps: number,
): Tensor
export function layerNorm(
  x: Tensor,
  weight: Tensor | undefined,
  bias: Tensor | undefined,
  eps: number,
  residual: Tensor,
): NormResult
export function layerNorm(
  x: Tensor,
  weight: Tensor | undefined,
  bias: Tensor | undefined,
  eps: number,
  residual?: Tensor,
): Tensor | NormResult {
  return norm('layer_norm', x, weight, bias, residual, [eps])
}

function norm(
  op: string,
  x: Tensor,
  weight: Tensor | undefined,
  bias: Tensor | undefined,
  residual: Tensor | undefined,
  scalars: number[],
): Tensor | NormResult {
  checkFloat(op, 'x', x)
  for (const [name, parameter] of [['weight', weight] as const, ['bias', bias] as const]) {
    if (!parameter) continue
    checkFloat(op, name, parameter)
    checkShape(op, name, parameter, [x.shape.at(-1) ?? 1])
  }
  if (weight && bias) checkSameDType(op, weight, bias)
  if (residual) {
    checkSameDType(op, x, residual)
    checkShape(op, 'residual', residual, x.shape)
  }
  const operands = [x, residual, weight, bias].filter((t) => t !== undefined)
  return withContiguous(operands, (...contiguous) => {
    const find = (t: Tensor | undefined) => (t ? contiguous[operands.indexOf(t)] : undefined)
    const y = Tensor.empty(x.shape, x.dtype, x.device)
    const sum = residual ? Tensor.empty(x.shape, x.dtype, x.device) : undefined
    const inputs =
      op === 'rms_norm'
        ? [find(x), find(residual), find(weight)]
        : [find(x), find(residual), find(weight), find(bias)]
    call(op, [y, sum], inputs, scalars)
    return sum ? { y, sum } : y
  })
}
