import { HalfbyteError } from '../../errors.js'
import type { Device } from '../device.js'
import { type DType } from '../dtype.js'
import { Tensor } from '../tensor.js'
import {
  call,
  checkContiguous,
  checkDTypes,
  checkFloat,
  checkShape,
  checkTensor,
  fail,
  rowsAndCols,
  show,
  withContiguous,
} from './call.js'

export type QuantType = 'nf4' | 'fp4'
export const QUANT_TYPES = { nf4: 0, fp4: 1 } as const

/**
 * How the bytes of a 4-bit weight are ordered. 'flat' is bitsandbytes' order; 'tiled' is a permutation of it that GPUs
 * multiply with (weights [n, k] in blocks of 64 with n % 16 = 0 and k % 64 = 0). Sizes and dtypes are the same.
 */
export type Layout4 = 'flat' | 'tiled'
const LAYOUTS = { flat: 0, tiled: 1 } as const

/**
 * A 4-bit weight [n, k]: codes uint8 of (n k + 1) / 2 bytes, absmax float32 [blocks], or
 * uint8 [blocks] with nestedAbsmax float32 [ceil(blocks / 256)], nestedCode float32 [256] and offset float32 [1].
 */
export interface Packed4 {
  codes: Tensor
  absmax: Tensor
  nestedAbsmax?: Tensor | undefined
  nestedCode?: Tensor | undefined
  offset?: Tensor | undefined
  quantType: QuantType
  blocksize: number
  n: number
  k: number
  /** Default 'flat'. */
  layout?: Layout4 | undefined
}

function canTile4(n: number, k: number, blocksize: number): boolean {
  return blocksize === 64 && n % 16 === 0 && k % 64 === 0
}

/** The layout in which a device multiplies fastest with a weight [n, k]. */
export function bestLayout4(device: Device, n: number, k: number, blocksize: number): Layout4 {
  return device.native.tiles4bit && canTile4(n, k, blocksize) ? 'tiled' : 'flat'
}

/** Refuses a packed weight whose parts do not fit it. */
export function checkPacked(op: string, w: Packed4): void {
  for (const name of ['codes', 'absmax'] as const) checkTensor(op, name, (w as Packed4 | undefined)?.[name])
  checkBlocksize(op, w.blocksize)
  if (!Object.hasOwn(QUANT_TYPES, w.quantType)) badQuantType(op, w.quantType)
  const blocks = Math.ceil((w.n * w.k) / w.blocksize)
  checkDTypes(op, 'codes', w.codes, 'uint8')
  if (w.codes.size !== Math.ceil((w.n * w.k) / 2)) {
    fail(
      op,
      `codes ${show(w.codes.shape)} do not hold [${w.n}, ${w.k}]: ${Math.ceil((w.n * w.k) / 2)} bytes are needed`,
    )
  }
  if (w.absmax.size !== blocks) fail(op, `absmax has ${w.absmax.size} blocks, [${w.n}, ${w.k}] has ${blocks}`)
  if (w.nestedAbsmax) {
    checkDTypes(op, 'absmax', w.absmax, 'uint8')
    checkDTypes(op, 'nestedAbsmax', w.nestedAbsmax, 'float32')
    if (w.nestedAbsmax.size !== Math.ceil(blocks / 256)) {
      fail(op, `nestedAbsmax has ${w.nestedAbsmax.size} entries, ${Math.ceil(blocks / 256)} are needed`)
    }
    if (w.nestedCode?.size !== 256 || w.offset?.size !== 1)
      fail(op, 'a nested absmax needs nestedCode [256] and offset [1]')
    checkDTypes(op, 'nestedCode', w.nestedCode, 'float32')
    checkDTypes(op, 'offset', w.offset, 'float32')
  } else {
    checkDTypes(op, 'absmax', w.absmax, 'float32')
  }
  const { layout = 'flat' } = w
  if (!Object.hasOwn(LAYOUTS, layout) || (layout === 'tiled' && !canTile4(w.n, w.k, w.blocksize))) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_VALUE',
      `${op}: layout ${JSON.stringify(layout)} of [${w.n}, ${w.k}] in blocks of ${w.blocksize}; ` +
        "it is 'flat', or 'tiled' with blocks of 64, n a multiple of 16 and k of 64",
    )
  }
}

/** Tensors of a packed weight, in the order of the addon. */
const PARTS = ['codes', 'absmax', 'nestedAbsmax', 'nestedCode', 'offset'] as const

/** The operands of a packed weight, and its scalars. */
export function packedOperands(
  op: string,
  w: Packed4,
): { inputs: (Tensor | undefined)[]; scalars: number[] } {
  checkPacked(op, w)
  const inputs = PARTS.map((name) => w[name])
  inputs.forEach((part, i) => part && checkContiguous(op, PARTS[i]!, part))
  return {
    inputs,
    scalars: [QUANT_TYPES[w.quantType], w.blocksize, w.n, w.k, LAYOUTS[w.layout ?? 'flat']],
  }
}

/** The tensors of a packed weight, and the weight again from such a list. */
export function packedTensors(w: Packed4): [Tensor[], (tensors: readonly Tensor[]) => Packed4] {
  const names = PARTS.filter((name) => w[name])
  return [
    names.map((name) => w[name]!),
    (tensors) => ({ ...w, ...Object.fromEntries(names.map((name, i) => [name, tensors[i]])) }),
  ]
}

function badQuantType(op: string, type: unknown): never {
  throw new HalfbyteError(
    'ERR_HALFBYTE_VALUE',
    `${op}: quantType ${JSON.stringify(type)} is neither nf4 nor fp4`,
  )
}

function checkBlocksize(op: string, blocksize: number): void {
  if (![32, 64, 128, 256, 512, 1024, 2048, 4096].includes(blocksize)) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_VALUE',
      `${op}: blocksize ${blocksize} is not one of 32, 64, 128, 256, 512, 1024, 2048, 4096`,
    )
  }
}

/** x (float, any shape) to 4-bit codes uint8 [ceil(n / 2), 1] and absmax float32 [ceil(n / blocksize)]. */
export function quantizeBlocks4(
  x: Tensor,
  quantType: QuantType,
  blocksize: number,
): { codes: Tensor; absmax: Tensor } {
  checkFloat('quantize4bit', 'x', x)
  checkBlocksize('quantize4bit', blocksize)
  if (!Object.hasOwn(QUANT_TYPES, quantType)) badQuantType('quantize4bit', quantType)
  return withContiguous([x], (input) => {
    const codes = Tensor.empty([Math.ceil(x.size / 2), 1], 'uint8', x.device)
    const absmax = Tensor.empty([Math.ceil(x.size / blocksize)], 'float32', x.device)
    call('quantize_4bit', [codes, absmax], [input], [QUANT_TYPES[quantType], blocksize])
    return { codes, absmax }
  })
}

/** Codes and absmax of a weight in another layout; views of the same when it has that layout already. */
export function tile4(w: Packed4, layout: Layout4): { codes: Tensor; absmax: Tensor } {
  checkPacked('tile4', { ...w, layout })
  checkPacked('tile4', w)
  if ((w.layout ?? 'flat') === layout) return { codes: w.codes.share(), absmax: w.absmax.share() }
  return withContiguous([w.codes, w.absmax], (from, statistics) => {
    const codes = Tensor.empty(w.codes.shape, 'uint8', w.codes.device)
    const absmax = Tensor.empty(w.absmax.shape, w.absmax.dtype, w.codes.device)
    call('tile_4bit', [codes, absmax], [from, statistics], [w.n, w.k, LAYOUTS[layout]])
    return { codes, absmax }
  })
}

/** The values of a packed weight, as a tensor of `shape` (n k elements). */
export function dequantizeBlocks4(w: Packed4, dtype: DType, shape: readonly number[] = [w.n, w.k]): Tensor {
  const { inputs, scalars } = packedOperands('dequantize4bit', w)
  const y = Tensor.empty(shape, dtype, w.codes.device)
  checkFloat('dequantize4bit', 'the result', y)
  if (y.size !== w.n * w.k)
    fail('dequantize4bit', `${show(shape)} does not have the ${w.n * w.k} elements of the weight`)
  call('dequantize_4bit', [y], inputs, scalars)
  return y
}

/** 8-bit blockwise by an ascending code float32 [256]: codes uint8 of x's shape, absmax float32 [ceil(n / blocksize)]. */
export function quantizeBlocks8(
  x: Tensor,
  code: Tensor,
  blocksize: number,
): { codes: Tensor; absmax: Tensor } {
  checkFloat('quantizeBlockwise', 'x', x)
  checkDTypes('quantizeBlockwise', 'code', code, 'float32')
  checkShape('quantizeBlockwise', 'code', code, [256])
  if (!Number.isInteger(blocksize) || blocksize < 1)
    fail('quantizeBlockwise', `blocksize ${blocksize} is not a positive whole number`)
  return withContiguous([x, code], (input, table) => {
    const codes = Tensor.empty(x.shape, 'uint8', x.device)
    const absmax = Tensor.empty([Math.ceil(x.size / blocksize)], 'float32', x.device)
    call('quantize_blockwise', [codes, absmax], [input, table], [blocksize])
    return { codes, absmax }
  })
}

export function dequantizeBlocks8(
  codes: Tensor,
  absmax: Tensor,
  code: Tensor,
  blocksize: number,
  dtype: DType,
): Tensor {
  checkDTypes('dequantizeBlockwise', 'codes', codes, 'uint8')
  checkDTypes('dequantizeBlockwise', 'absmax', absmax, 'float32')
  checkShape('dequantizeBlockwise', 'code', code, [256])
  if (absmax.size !== Math.ceil(codes.size / blocksize)) {
    fail(
      'dequantizeBlockwise',
      `absmax has ${absmax.size} blocks, ${codes.size} codes in blocks of ${blocksize} need ${Math.ceil(codes.size / blocksize)}`,
    )
  }
  return withContiguous([codes, absmax, code], (q, a, table) => {
    const y = Tensor.empty(codes.shape, dtype, codes.device)
    checkFloat('dequantizeBlockwise', 'the result', y)
    call('dequantize_blockwise', [y], [q, a, table], [blocksize])
    return y
  })
}

/** Rows of a 4-bit table [V, D] by int32 or int64 ids: [...ids.shape, D]. */
export function gatherRows4(w: Packed4, ids: Tensor, dtype: DType): Tensor {
  checkDTypes('gatherRows4bit', 'ids', ids, 'int32', 'int64')
  const { inputs, scalars } = packedOperands('gatherRows4bit', w)
  return withContiguous([ids], (i) => {
    const y = Tensor.empty([...ids.shape, w.k], dtype, ids.device)
    call('gather_rows_4bit', [y], [...inputs, i], scalars)
    return y
  })
}

/** Rows of an int8 table [V, D] with row absmax scb [V] by int32 or int64 ids: [...ids.shape, D]. */
export function gatherRows8(codes: Tensor, scb: Tensor, ids: Tensor, dtype: DType): Tensor {
  checkDTypes('gatherRows8bit', 'ids', ids, 'int32', 'int64')
  checkDTypes('gatherRows8bit', 'codes', codes, 'int8')
  checkShape('gatherRows8bit', 'scb', scb, [codes.shape[0]!])
  return withContiguous([codes, scb, ids], (q, s, i) => {
    const y = Tensor.empty([...ids.shape, codes.shape[1]!], dtype, ids.device)
    call('gather_rows_8bit', [y], [q, s, i])
    return y
  })
}

export interface Int8Rows {
  /** int8, x's shape. */
  codes: Tensor
  /** float32 [rows], max |x| of the row (not divided by 127). */
  rowAbsmax: Tensor
  /** uint8 [K], 1 for a column with an outlier; only with a threshold. */
  outlierMask?: Tensor | undefined
}

/** An outlier threshold: 0 (off) or a positive number. */
export function checkThreshold(op: string, threshold: number): void {
  if (typeof threshold !== 'number' || !(threshold >= 0)) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_VALUE',
      `${op}: threshold ${String(threshold)} is neither 0 (no outliers) nor a positive number`,
    )
  }
}

/**
 * LLM.int8() row-wise quantisation (arXiv 2208.07339). With threshold > 0, elements of at least that magnitude do not
 * count for the row's absmax, and their whole columns are 0 in the codes. fp16Input rounds x to float16 first.
 */
export function int8QuantizeRows(x: Tensor, threshold = 0, fp16Input = false): Int8Rows {
  checkFloat('int8QuantizeRows', 'x', x)
  checkThreshold('int8QuantizeRows', threshold)
  return withContiguous([x], (input) => {
    const [rows, cols] = rowsAndCols(x)
    const codes = Tensor.empty(x.shape, 'int8', x.device)
    const rowAbsmax = Tensor.empty([rows], 'float32', x.device)
    const outlierMask = threshold > 0 ? Tensor.empty([cols], 'uint8', x.device) : undefined
    call('int8_quantize_rows', [codes, rowAbsmax, outlierMask], [input], [threshold, fp16Input ? 1 : 0])
    return { codes, rowAbsmax, outlierMask }
  })
}

/** codes int8 [..., K] * scb / 127; scb: float32, one for each row, in any shape. */
export function int8DequantizeRows(codes: Tensor, scb: Tensor, dtype: DType): Tensor {
  checkDTypes('int8DequantizeRows', 'codes', codes, 'int8')
  checkDTypes('int8DequantizeRows', 'scb', scb, 'float32')
  const [rows] = rowsAndCols(codes)
  if (scb.size !== rows)
    fail('int8DequantizeRows', `scb ${show(scb.shape)} does not hold ${rows} rows of codes`)
  return withContiguous([codes, scb], (q, s) => {
    const y = Tensor.empty(codes.shape, dtype, codes.device)
    checkFloat('int8DequantizeRows', 'the result', y)
    call('int8_dequantize_rows', [y], [q, s])
    return y
  })
}

/** int32 [M, N] = a int8 [M, K] times b int8 [N, K] transposed, exact. */
export function int8Matmul(a: Tensor, b: Tensor): Tensor {
  checkDTypes('int8Matmul', 'a', a, 'int8')
  checkDTypes('int8Matmul', 'b', b, 'int8')
  if (a.ndim !== 2 || b.ndim !== 2 || a.shape[1] !== b.shape[1]) {
    fail('int8Matmul', `a ${show(a.shape)} and b ${show(b.shape)} must be [M, K] and [N, K]`)
  }
  return withContiguous([a, b], (left, right) => {
    const acc = Tensor.empty([a.shape[0]!, b.shape[0]!], 'int32', a.device)
    call('int8_matmul', [acc], [left, right])
    return acc
  })
}

/** acc int32 [M, N] * rowAbsmax [M] * colAbsmax [N] / 127^2 + bias, in bitsandbytes' order of operations. */
export function int8MatmulDequantize(
  acc: Tensor,
  rowAbsmax: Tensor,
  colAbsmax: Tensor,
  bias?: Tensor,
  dtype: DType = 'float16',
): Tensor {
  const op = 'int8MatmulDequantize'
  checkDTypes(op, 'acc', acc, 'int32')
  if (acc.ndim !== 2) fail(op, `acc is ${show(acc.shape)}, it must be [M, N]`)
  checkDTypes(op, 'rowAbsmax', rowAbsmax, 'float32')
  checkDTypes(op, 'colAbsmax', colAbsmax, 'float32')
  checkShape(op, 'rowAbsmax', rowAbsmax, [acc.shape[0]!])
  checkShape(op, 'colAbsmax', colAbsmax, [acc.shape[1]!])
  if (bias) {
    checkFloat(op, 'bias', bias)
    checkShape(op, 'bias', bias, [acc.shape[1]!])
  }
  return withContiguous([acc, rowAbsmax, colAbsmax, ...(bias ? [bias] : [])], (sums, rows, cols, add) => {
    const y = Tensor.empty(acc.shape, dtype, acc.device)
    checkFloat(op, 'the result', y)
    call('int8_matmul_dequantize', [y], [sums, rows, cols, add])
    return y
  })
}
