/**
 * bitsandbytes' functional interface on tensors: quantise and dequantise blocks, and the two quantised products. Every
 * function queues its work and returns at once.
 */
import { HalfbyteError } from '../errors.js'
import { noGrad } from '../tensor/autograd.js'
import { defaultDevice, type DeviceLike } from '../tensor/device.js'
import type { DType } from '../tensor/dtype.js'
import {
  add,
  dequantizeBlocks4,
  dequantizeBlocks8,
  int8DequantizeRows,
  int8Matmul,
  int8MatmulDequantize,
  int8QuantizeRows,
  linear4bit,
  linear8bit,
  mean,
  quantizeBlocks4,
  quantizeBlocks8,
  sub,
  type Int8Rows,
  type QuantType,
} from '../tensor/ops.js'
import { sizeOf } from '../tensor/shape.js'
import { Tensor } from '../tensor/tensor.js'
import { tidy } from '../tensor/tidy.js'
import { QUANT_STORAGES, type QuantStorage } from './config.js'
import { codebook, QuantState } from './quant_state.js'
import { Statistics, type NestedState } from './statistics.js'

export interface Quantize4bitOptions {
  /** A power of two from 32 to 4096. Default 64. */
  blocksize?: number
  /** Quantise the absmax too (double quantisation). Default false. */
  compressStatistics?: boolean
  /** Default 'fp4'. */
  quantType?: QuantType
  /** The dtype that the bytes of the codes are held as; their number must be a multiple of its size. Default 'uint8'. */
  quantStorage?: QuantStorage
}

export interface Quantized4bit {
  /** uint8 [ceil(n / 2), 1], two codes in a byte, the first in the high half; or the same bytes as quantStorage. */
  codes: Tensor
  /** Owns the statistics: dispose() it. */
  state: QuantState
}

/** Packs a float tensor into 4-bit codes with one absmax per block of the row-major elements. */
export function quantize4bit(x: Tensor, options: Quantize4bitOptions = {}): Quantized4bit {
  const { blocksize = 64, compressStatistics = false, quantType = 'fp4', quantStorage = 'uint8' } = options
  if (!QUANT_STORAGES.includes(quantStorage)) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_VALUE',
      `quantize4bit: quantStorage ${JSON.stringify(quantStorage)} is not one of ${QUANT_STORAGES.join(', ')}`,
    )
  }
  const { shape, dtype } = x
  const common = { shape, dtype, blocksize, quantType }
  const parts = tidy(() => {
    const { codes: bytes, absmax } = quantizeBlocks4(x, quantType, blocksize)
    const stored = bytes.reshape(bytes.size).bitcast(quantStorage)
    const codes = stored.reshape(stored.size, 1)
    return compressStatistics ? { codes, ...nest(absmax, 256) } : { codes, absmax }
  })
  const { codes, ...statistics } = parts
  return { codes, state: new QuantState({ ...common, ...statistics }) }
}

/** Statistics quantised themselves: absmax = state2's values + offset. To be called in a tidy(). */
function nest(absmax: Tensor, blocksize: number): { absmax: Tensor; offset: Tensor; state2: NestedState } {
  const offset = absmax.size > 0 ? mean(absmax) : Tensor.zeros([1], 'float32', absmax.device)
  const code = codebook('dynamic', absmax.device)
  const nested = quantizeBlocks8(sub(absmax, offset), code, blocksize)
  return {
    absmax: nested.codes,
    offset,
    state2: { absmax: nested.absmax, code, blocksize, dtype: 'float32' },
  }
}

/** What `run` makes of the bytes of codes, whatever dtype they are held as. */
function withBytes(codes: Tensor, run: (bytes: Tensor) => Tensor): Tensor {
  return codes.dtype === 'uint8' ? run(codes) : tidy(() => run(codes.reshape(codes.size).bitcast('uint8')))
}

/** The values of a packed tensor, in the shape and, unless another is asked for, the dtype that was quantised. */
export function dequantize4bit(codes: Tensor, state: QuantState, dtype: DType = state.dtype): Tensor {
  return withBytes(codes, (bytes) => dequantizeBlocks4(state.packed(bytes), dtype, state.shape))
}

/** quantize4bit() with quantType 'nf4'. */
export function quantizeNf4(x: Tensor, options: Omit<Quantize4bitOptions, 'quantType'> = {}): Quantized4bit {
  return quantize4bit(x, { ...options, quantType: 'nf4' })
}

/** quantize4bit() with quantType 'fp4'. */
export function quantizeFp4(x: Tensor, options: Omit<Quantize4bitOptions, 'quantType'> = {}): Quantized4bit {
  return quantize4bit(x, { ...options, quantType: 'fp4' })
}

function dequantizeAs(quantType: QuantType, codes: Tensor, state: QuantState, dtype?: DType): Tensor {
  if (state.quantType !== quantType) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_VALUE',
      `The state is of ${state.quantType}, not of ${quantType}; dequantize4bit() takes both`,
    )
  }
  return dequantize4bit(codes, state, dtype)
}

export const dequantizeNf4 = (codes: Tensor, state: QuantState, dtype?: DType): Tensor =>
  dequantizeAs('nf4', codes, state, dtype)
export const dequantizeFp4 = (codes: Tensor, state: QuantState, dtype?: DType): Tensor =>
  dequantizeAs('fp4', codes, state, dtype)

export interface Matmul4bitOptions {
  /** float [N]. */
  bias?: Tensor | undefined
}

/** x [..., K] times a packed weight [N, K] transposed, plus bias: exact to the rounding of x's dtype. */
export function matmul4bit(
  x: Tensor,
  codes: Tensor,
  state: QuantState,
  options: Matmul4bitOptions = {},
): Tensor {
  if (state.shape.length !== 2) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_SHAPE',
      `matmul4bit: the weight is [${state.shape.join(', ')}], it must be [N, K]`,
    )
  }
  return withBytes(codes, (bytes) => linear4bit(x, state.packed(bytes), options))
}

/** A code of 256 ascending values between -1 (signed) or 0 and 1, dense near zero: float32 [256]. */
export function createDynamicMap(signed = true, device: DeviceLike = defaultDevice()): Tensor {
  return codebook(signed ? 'dynamic' : 'dynamic_unsigned', device)
}

/** The 16 values of a 4-bit type: float32 [16]. */
export function get4bitType(quantType: QuantType, device: DeviceLike = defaultDevice()): Tensor {
  return codebook(quantType, device)
}

export interface BlockwiseStateParts {
  absmax: Tensor
  code: Tensor
  blocksize: number
  dtype: DType
  offset?: Tensor | undefined
  state2?: NestedState | undefined
}

/** What is needed, besides the codes, to read an 8-bit blockwise tensor. Owns its tensors: dispose() it. */
export class BlockwiseState extends Statistics {
  readonly blocksize: number
  readonly dtype: DType

  constructor(parts: BlockwiseStateParts) {
    super(parts)
    this.blocksize = parts.blocksize
    this.dtype = parts.dtype
  }
}

export interface QuantizeBlockwiseOptions {
  /** float32 [256], ascending; it stays the caller's. Default: the signed dynamic map. */
  code?: Tensor | undefined
  /** Any positive whole number. Default 4096. */
  blocksize?: number
  /** Quantise the absmax too, in blocks of the same size by the signed dynamic map. Default false. */
  nested?: boolean
}

/** Each element as the nearest of 256 values times its block's absmax. codes: uint8 of x's shape. */
export function quantizeBlockwise(
  x: Tensor,
  options: QuantizeBlockwiseOptions = {},
): { codes: Tensor; state: BlockwiseState } {
  const { blocksize = 4096, nested = false } = options
  const code = options.code?.share() ?? createDynamicMap(true, x.device)
  try {
    const { codes, ...statistics } = tidy(() => {
      const { codes, absmax } = quantizeBlocks8(x, code, blocksize)
      return nested ? { codes, ...nest(absmax, blocksize) } : { codes, absmax }
    })
    return { codes, state: new BlockwiseState({ ...statistics, code, blocksize, dtype: x.dtype }) }
  } catch (error) {
    code.dispose()
    throw error
  }
}

/** The values of codes, in their shape and, unless another is asked for, the dtype that was quantised. */
export function dequantizeBlockwise(
  codes: Tensor,
  state: BlockwiseState,
  dtype: DType = state.dtype,
): Tensor {
  const { absmax, code, blocksize, offset, state2 } = state
  if (!state2 || !offset) return dequantizeBlocks8(codes, absmax, code, blocksize, dtype)
  return tidy(() => {
    const centred = dequantizeBlocks8(absmax, state2.absmax, state2.code, state2.blocksize, 'float32')
    return dequantizeBlocks8(codes, add(centred, offset), code, blocksize, dtype)
  })
}

/** A weight as LLM.int8() keeps it: codes int8 [N, K] and the largest magnitude of each row, float32 [N]. */
export interface Int8Weight {
  CB: Tensor
  SCB: Tensor
}

export interface MatmulOptions {
  /** Columns of x with an element of at least this magnitude are multiplied in x's precision. Default 0: none. */
  threshold?: number
  /** float [N]. */
  bias?: Tensor | undefined
  /** bitsandbytes' float16 roundings of input, product and output. Default false. */
  bnbExact?: boolean
}

/**
 * LLM.int8() (arXiv 2208.07339): x [..., K] times a weight transposed, plus bias. The weight is an Int8Weight, or a float
 * [N, K] that is quantised on the way, and to which gradients go as if it were not.
 */
export function matmul(x: Tensor, weight: Tensor | Int8Weight, options: MatmulOptions = {}): Tensor {
  if (!(weight instanceof Tensor)) return linear8bit(x, weight.CB, weight.SCB, options)
  const { codes, rowAbsmax } = noGrad(() => int8QuantizeRows(weight, 0, true))
  try {
    return linear8bit(x, codes, rowAbsmax, { ...options, source: weight })
  } finally {
    codes.dispose()
    rowAbsmax.dispose()
  }
}

/**
 * Row-wise int8 codes of x rounded to float16. With a threshold, columns that hold an element of at least that magnitude
 * are marked in outlierMask and are 0 in the codes.
 */
export function int8VectorwiseQuant(x: Tensor, threshold = 0): Int8Rows {
  return int8QuantizeRows(x, threshold, true)
}

/** codes [..., K] * rowAbsmax / 127, rowAbsmax in the order of the rows. */
export function int8VectorwiseDequant(codes: Tensor, rowAbsmax: Tensor, dtype: DType = 'float32'): Tensor {
  return int8DequantizeRows(codes, rowAbsmax, dtype)
}

/** int32 [..., N] = a int8 [..., K] times b int8 [N, K] transposed, exact. */
export function int8LinearMatmul(a: Tensor, b: Tensor): Tensor {
  if (a.ndim === 2) return int8Matmul(a, b)
  return tidy(() => {
    const k = a.shape.at(-1) ?? 1
    const rows = sizeOf(a.shape.slice(0, -1))
    return int8Matmul(a.reshape(rows, k), b).reshape(...a.shape.slice(0, -1), b.shape[0] ?? 0)
  })
}

export interface Int8MmDequantOptions {
  /** float [N]. */
  bias?: Tensor | undefined
  /** Default 'float16'. */
  dtype?: DType
}

/** The product of two int8 matrices, int32 [M, N], times the rows' and columns' absmax / 127, plus bias. */
export function int8MmDequant(
  acc: Tensor,
  rowAbsmax: Tensor,
  colAbsmax: Tensor,
  options: Int8MmDequantOptions = {},
): Tensor {
  return int8MatmulDequantize(acc, rowAbsmax, colAbsmax, options.bias, options.dtype ?? 'float16')
}
