/** Mixtures of experts: tokens are sent to a few of many weights each, and only those compute them. */
import { HalfbyteError } from '../../errors.js'
import { needsGrad } from '../autograd.js'
import type { Device } from '../device.js'
import { DTYPES, type DType } from '../dtype.js'
import { Tensor } from '../tensor.js'
import {
  call,
  checkContiguous,
  checkDTypes,
  checkFloat,
  checkSameDType,
  checkShape,
  fail,
  show,
  withContiguous,
} from './call.js'
import { ACTIVATIONS, type Activation } from './elementwise.js'
import { packedOperands, type Packed4 } from './quantize.js'

/** One of many weights [n, k] with its bias [n]: float, packed in 4 bits, or int8 rows as linear8bit() takes them. */
export type ExpertWeight = { bias?: Tensor | undefined } & (
  | { kind: 'dense'; weight: Tensor }
  | { kind: '4bit'; weight: Packed4 }
  | { kind: 'int8'; weight: Tensor; scb: Tensor; threshold: number; bnbExact: boolean }
)

const FORMS = { dense: 0, '4bit': 1, int8: 2 } as const
/** Operands of an expert. */
const PARTS = 6

/** Weights of one form and shape, checked, as the ops take them. */
export interface ExpertWeights {
  readonly count: number
  readonly n: number
  readonly k: number
  readonly device: Device
  /** PARTS for each of them. */
  readonly operands: readonly (Tensor | undefined)[]
  readonly scalars: readonly number[]
}

function operandsOf(op: string, expert: ExpertWeight): { parts: (Tensor | undefined)[]; form: number[] } {
  const shape = (weight: Tensor): [number, number] => {
    if (weight.ndim !== 2) fail(op, `a weight is ${show(weight.shape)}, it must be [N, K]`)
    return weight.shape as [number, number]
  }
  switch (expert.kind) {
    case 'dense': {
      checkFloat(op, 'a weight', expert.weight)
      checkContiguous(op, 'a weight', expert.weight)
      const [n, k] = shape(expert.weight)
      return { parts: [expert.weight], form: [FORMS.dense, 0, 64, n, k, 0, 0, 0] }
    }
    case '4bit': {
      const { inputs, scalars } = packedOperands(op, expert.weight)
      return { parts: inputs, form: [FORMS['4bit'], ...scalars, 0, 0] }
    }
    case 'int8': {
      const { weight, scb, threshold, bnbExact } = expert
      checkDTypes(op, 'a weight', weight, 'int8')
      checkContiguous(op, 'a weight', weight)
      const [n, k] = shape(weight)
      checkDTypes(op, 'scb', scb, 'float32')
      checkShape(op, 'scb', scb, [n])
      checkContiguous(op, 'scb', scb)
      return { parts: [weight, scb], form: [FORMS.int8, 0, 64, n, k, 0, threshold, bnbExact ? 1 : 0] }
    }
  }
}

/** The experts' weights as operands of the products below; undefined where they differ in form, shape or device. */
export function expertWeights(experts: readonly ExpertWeight[]): ExpertWeights | undefined {
  const op = 'expertWeights'
  const operands: (Tensor | undefined)[] = []
  let first: number[] | undefined
  let device: Device | undefined
  for (const expert of experts) {
    const { parts, form } = operandsOf(op, expert)
    device ??= parts[0]!.device
    first ??= form
    const { bias } = expert
    if (bias) {
      checkFloat(op, 'bias', bias)
      checkShape(op, 'bias', bias, [form[3]!])
      checkContiguous(op, 'bias', bias)
    }
    if (form.some((value, i) => value !== first![i])) return undefined
    const all = [bias, ...parts]
    if (all.some((part) => part && part.device !== device)) return undefined
    operands.push(...all, ...Array.from({ length: PARTS - all.length }, () => undefined))
  }
  if (!first || !device) return undefined
  const nested = (e: number) => operands[e * PARTS + 3] !== undefined
  if (experts.some((_, e) => nested(e) !== nested(0))) return undefined
  return { count: experts.length, n: first[3]!, k: first[4]!, device, operands, scalars: first }
}

/** Whether the products are there for x of a dtype and so many pairs of a token and an expert, and save time. */
export function takesExperts(experts: ExpertWeights, dtype: DType, pairs: number): boolean {
  return experts.device.native.takesExperts([DTYPES[dtype].id, pairs, experts.count, ...experts.scalars])
}

function checkPairs(op: string, x: Tensor, ids: Tensor, { k, n }: ExpertWeights): void {
  checkFloat(op, 'x', x)
  checkDTypes(op, 'ids', ids, 'int32')
  if (ids.ndim !== 2) fail(op, `ids are ${show(ids.shape)}, they must be [tokens, experts of a token]`)
  const rows = x.shape[0]
  if (x.ndim !== 2 || x.shape[1] !== k || (rows !== ids.shape[0] && rows !== ids.size)) {
    fail(op, `x ${show(x.shape)} does not fit ids ${show(ids.shape)} and weights [${n}, ${k}]`)
  }
}

function refuseGradients(op: string, ...inputs: (Tensor | undefined)[]): void {
  if (!needsGrad(...inputs)) return
  throw new HalfbyteError(
    'ERR_HALFBYTE_USAGE',
    `${op} has no gradient; inside of noGrad() it may be used, elsewhere let every expert compute`,
  )
}

/**
 * y[p] = x[p] w[e]^T + bias[e] with e = ids[p], for each pair p of a token and one of its experts: [ids.size, n]. ids int32
 * [tokens, k], each row's different; x float [tokens, k'] or a row for each pair. Only the experts that are named compute,
 * and nobody waits for the ids. An id that is none gives NaN.
 */
export function linearExperts(x: Tensor, ids: Tensor, experts: ExpertWeights): Tensor {
  checkPairs('linearExperts', x, ids, experts)
  refuseGradients('linearExperts', x, ...experts.operands)
  return withContiguous([x, ids], (input, i) => {
    const y = Tensor.empty([ids.size, experts.n], x.dtype, x.device)
    call('linear_experts', [y], [input, i, ...experts.operands], experts.scalars)
    return y
  })
}

/** activation(linearExperts(x, ids, gate)) * linearExperts(x, ids, up), of one form and shape. */
export function linearExpertsGated(
  x: Tensor,
  ids: Tensor,
  gate: ExpertWeights,
  up: ExpertWeights,
  activation: Activation,
): Tensor {
  const op = 'linearExpertsGated'
  checkPairs(op, x, ids, gate)
  if (gate.count !== up.count || gate.scalars.some((value, i) => value !== up.scalars[i]))
    fail(op, `gate has ${gate.count} weights [${gate.n}, ${gate.k}], up ${up.count} [${up.n}, ${up.k}]`)
  refuseGradients(op, x, ...gate.operands, ...up.operands)
  return withContiguous([x, ids], (input, i) => {
    const y = Tensor.empty([ids.size, gate.n], x.dtype, x.device)
    const operands = [input, i, ...gate.operands, ...up.operands]
    call('linear_experts_gated', [y], operands, [...gate.scalars, ACTIVATIONS[activation]])
    return y
  })
}

export interface RouteOptions {
  /** Experts that a token goes to. */
  perToken: number
  /** float32, scores' shape: what experts are chosen by. Default: the scores. */
  choice?: Tensor | undefined
  /** Weights are shares of exp(score) over all experts; default: the scores themselves. */
  softmax?: boolean
  /** Weights of a token are divided by their sum + tiny. */
  normalize?: boolean
  tiny?: number
  /** Default 1. */
  scale?: number
}

/**
 * The experts of each token by scores float32 [tokens, experts]: ids int32 [tokens, perToken], ascending, and weights
 * float32. Of equal ones the first is chosen; NaN counts as -infinity.
 */
export function routeTokens(scores: Tensor, options: RouteOptions): { ids: Tensor; weights: Tensor } {
  const op = 'routeTokens'
  const { perToken, choice, softmax = false, normalize = false, tiny = 0, scale = 1 } = options
  checkDTypes(op, 'scores', scores, 'float32')
  if (scores.ndim !== 2) fail(op, `scores are ${show(scores.shape)}, they must be [tokens, experts]`)
  const [tokens, experts] = scores.shape as [number, number]
  if (!Number.isInteger(perToken) || perToken < 1 || perToken > experts)
    fail(op, `perToken is ${perToken}, there are ${experts} experts`)
  if (choice) {
    checkDTypes(op, 'choice', choice, 'float32')
    checkShape(op, 'choice', choice, scores.shape)
  }
  refuseGradients(op, scores, choice)
  return withContiguous([scores, ...(choice ? [choice] : [])], (values, by) => {
    const ids = Tensor.empty([tokens, perToken], 'int32', scores.device)
    const weights = Tensor.empty([tokens, perToken], 'float32', scores.device)
    const scalars = [softmax ? 1 : 0, normalize ? 1 : 0, tiny, scale]
    call('route_tokens', [ids, weights], [values, by], scalars)
    return { ids, weights }
  })
}

/** y[t] = residual[t] + the sum of weights[t, j] x[t k + j] over j, in order; x [tokens k, n], weights float32 [tokens, k]. */
export function weightedSum(x: Tensor, weights: Tensor, residual?: Tensor): Tensor {
  const op = 'weightedSum'
  checkFloat(op, 'x', x)
  checkDTypes(op, 'weights', weights, 'float32')
  if (x.ndim !== 2 || weights.ndim !== 2 || x.shape[0] !== weights.size)
    fail(op, `x ${show(x.shape)} does not have a row for each of the weights ${show(weights.shape)}`)
  const shape = [weights.shape[0]!, x.shape[1]!]
  if (residual) {
    checkSameDType(op, x, residual)
    checkShape(op, 'residual', residual, shape)
  }
  refuseGradients(op, x, weights, residual)
  return withContiguous([x, weights, ...(residual ? [residual] : [])], (values, factors, first) => {
    const y = Tensor.empty(shape, x.dtype, x.device)
    call('weighted_sum', [y], [values, factors, first])
    return y
  })
}
