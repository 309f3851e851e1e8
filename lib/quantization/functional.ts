/**
 * bitsandbytes' functional interface on tensors: quantise and dequantise blocks, and the two quantised products. Every
 * function queues its work and returns at once.
 */
import {
  dequantizeBlocks4,
  mean,
  quantizeBlocks4,
  quantizeBlocks8,
  sub,
  type QuantType,
} from '../tensor/ops.js'
import type { DType } from '../tensor/dtype.js'
import { Tensor } from '../tensor/tensor.js'
import { tidy } from '../tensor/tidy.js'
import { codebook, QuantState } from './quant_state.js'

export interface Quantize4bitOptions {
  /** A power of two from 32 to 4096. Default 64. */
  blocksize?: number
  /** Quantise the absmax too (double quantisation). Default false. */
  compressStatistics?: boolean
  /** Default 'fp4'. */
  quantType?: QuantType
}

export interface Quantized4bit {
  /** uint8 [ceil(n / 2), 1], two codes in a byte, the first in the high half. */
  codes: Tensor
  /** Owns the statistics: dispose() it. */
  state: QuantState
}

/** Packs a float tensor into 4-bit codes with one absmax per block of the row-major elements. */
export function quantize4bit(x: Tensor, options: Quantize4bitOptions = {}): Quantized4bit {
  const { blocksize = 64, compressStatistics = false, quantType = 'fp4' } = options
  const { shape, dtype } = x
  const common = { shape, dtype, blocksize, quantType }
  if (!compressStatistics) {
    const { codes, absmax } = quantizeBlocks4(x, quantType, blocksize)
    return { codes, state: new QuantState({ ...common, absmax }) }
  }
  const parts = tidy(() => {
    const { codes, absmax } = quantizeBlocks4(x, quantType, blocksize)
    const offset = absmax.size > 0 ? mean(absmax) : Tensor.zeros([1], 'float32', x.device)
    const code = codebook('dynamic', x.device)
    const nested = quantizeBlocks8(sub(absmax, offset), code, 256)
    return { codes, offset, code, absmax: nested.codes, nestedAbsmax: nested.absmax }
  })
  const state = new QuantState({
    ...common,
    absmax: parts.absmax,
    offset: parts.offset,
    state2: { absmax: parts.nestedAbsmax, code: parts.code, blocksize: 256, dtype: 'float32' },
  })
  return { codes: parts.codes, state }
}

/** The values of a packed tensor, in the shape and, unless another is asked for, the dtype that was quantised. */
export function dequantize4bit(codes: Tensor, state: QuantState, dtype: DType = state.dtype): Tensor {
  return dequantizeBlocks4(state.packed(codes), dtype, state.shape)
}
