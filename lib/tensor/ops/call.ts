/** What every op uses: queueing by name, and the checks on operands. Nothing here computes. */
import { HalfbyteError } from '../../errors.js'
import { native, type NativeTensor } from '../../native.js'
import { isGradEnabled, withoutGradient } from '../autograd.js'
import type { Device } from '../device.js'
import { DTYPES, type DType } from '../dtype.js'
import { convertError } from '../rethrow.js'
import { Tensor } from '../tensor.js'

const ids = new Map(native.ops.map((name, id) => [name, id]))

type Operand = Tensor | null | undefined

/** Appends an op to the compute queue of its operands' device. `null` and `undefined` stand for absent operands. */
export function call(
  op: string,
  outputs: readonly Operand[],
  inputs: readonly Operand[],
  scalars: readonly number[] = [],
): void {
  const id = ids.get(op)
  if (id === undefined) {
    throw new HalfbyteError('ERR_HALFBYTE_UNSUPPORTED', `${op}: this build of the addon does not have the op`)
  }
  const { device } = outputs.find((t) => t)!
  const written = handles(op, device, outputs)
  const read = handles(op, device, inputs)
  if (isGradEnabled()) checkGradients(op, outputs, inputs)
  try {
    device.native.run(id, written, read, scalars)
  } catch (error) {
    throw convertError(error)
  }
  for (const output of outputs) output?.noteWrite()
}

/** Ops with a gradient come here while nothing is recorded: see record(). Integers carry no gradient on. */
function checkGradients(op: string, outputs: readonly Operand[], inputs: readonly Operand[]): void {
  for (const output of outputs) output?.checkWritable(op)
  const bad = inputs.find((input) => input?.requiresGrad)
  if (bad && outputs.some((output) => output && DTYPES[output.dtype].isFloat)) throw withoutGradient(op, bad)
}

function handles(op: string, device: Device, operands: readonly Operand[]): (NativeTensor | null)[] {
  const result: (NativeTensor | null)[] = []
  for (const operand of operands) {
    if (operand) checkTensor(op, 'an operand', operand)
    if (operand && operand.device !== device) {
      throw new HalfbyteError(
        'ERR_HALFBYTE_DEVICE',
        `${op}: operands on ${device.name} and ${operand.device.name}; move them to one device with to()`,
      )
    }
    result.push(operand ? operand.handle : null)
  }
  return result
}

export function fail(op: string, what: string): never {
  throw new HalfbyteError('ERR_HALFBYTE_SHAPE', `${op}: ${what}`)
}

export function show(shape: readonly number[]): string {
  return `[${shape.join(', ')}]`
}

export function sameShape(a: readonly number[], b: readonly number[]): boolean {
  return a.length === b.length && a.every((n, i) => n === b[i])
}

/** Refuses what is no tensor, as an array of numbers is none. */
export function checkTensor(op: string, name: string, value: unknown): asserts value is Tensor {
  if (value instanceof Tensor) return
  const what =
    value === null || typeof value !== 'object' ? typeof value : value.constructor?.name || 'object'
  throw new HalfbyteError(
    'ERR_HALFBYTE_VALUE',
    `${op}: ${name} must be a Tensor, not ${value === null ? 'null' : what}; Tensor.from() makes one of numbers`,
  )
}

export function checkDTypes(op: string, name: string, tensor: Tensor, ...allowed: DType[]): void {
  checkTensor(op, name, tensor)
  if (!allowed.includes(tensor.dtype)) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_DTYPE',
      `${op}: ${name} is ${tensor.dtype}, it must be ${allowed.join(' or ')}`,
    )
  }
}

export function checkFloat(op: string, name: string, tensor: Tensor): void {
  checkTensor(op, name, tensor)
  if (!DTYPES[tensor.dtype].isFloat) checkDTypes(op, name, tensor, 'float32', 'float16', 'bfloat16')
}

export function checkSameDType(op: string, a: Tensor, b: Tensor): void {
  checkTensor(op, 'an operand', a)
  checkTensor(op, 'an operand', b)
  if (a.dtype !== b.dtype) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_DTYPE',
      `${op}: operands of ${a.dtype} and ${b.dtype}; convert one with to()`,
    )
  }
}

export function checkShape(op: string, name: string, tensor: Tensor, shape: readonly number[]): void {
  checkTensor(op, name, tensor)
  if (!sameShape(tensor.shape, shape)) fail(op, `${name} is ${show(tensor.shape)}, it must be ${show(shape)}`)
}

export function checkContiguous(op: string, name: string, tensor: Tensor): void {
  checkTensor(op, name, tensor)
  if (!tensor.isContiguous) fail(op, `${name} ${show(tensor.shape)} is not contiguous; call contiguous()`)
}

/** Refuses to write to one place for several elements, as those that expand() repeats are. */
export function checkDistinct(op: string, y: Tensor): void {
  if (y.size > 0 && y.shape.some((length, d) => length > 1 && y.strides[d] === 0))
    fail(op, `${y.toString()} repeats elements, as expand() does; it cannot be written to`)
}

/** Runs `body` with contiguous versions of the operands and frees the copies that had to be made. */
export function withContiguous<T>(operands: readonly Tensor[], body: (...contiguous: Tensor[]) => T): T {
  for (const t of operands) checkTensor('ops', 'an operand', t)
  const made = operands.map((t) => t.contiguous())
  try {
    return body(...made)
  } finally {
    made.forEach((t, i) => t !== operands[i] && t.dispose())
  }
}

/** [rows, cols] of a tensor seen as rows of its last dimension. */
export function rowsAndCols(tensor: Tensor): [number, number] {
  const cols = tensor.shape.at(-1) ?? 1
  return [tensor.shape.slice(0, -1).reduce((a, b) => a * b, 1), cols]
}
