/**
 * Attention for models of one's own, without a cache: all tokens of all sequences go in at once. Sequences are packed
 * one after the other, [tokens, hidden], never padded. Generation with a paged cache is in lib/generation/.
 */
import { HalfbyteError } from '../errors.js'
import {
  pagedAttention,
  raggedPositions,
  rope,
  ropeTables,
  type AttentionOptions,
  type RaggedBatch,
} from '../tensor/ops.js'
import type { DType } from '../tensor/dtype.js'
import { Tensor } from '../tensor/tensor.js'
import { tidy } from '../tensor/tidy.js'
import { Linear } from './linear.js'
import { Module } from './module.js'
import type { Placement } from './parameter.js'

function gcd(a: number, b: number): number {
  return b === 0 ? a : gcd(b, a % b)
}

/**
 * The batch of packed sequences of these lengths, whose keys lie packed as well: with blocks as long as the lengths'
 * greatest common divisor every sequence begins at a block, and k [T, KV, D] is itself the cache.
 */
function packedBatch(
  lengths: readonly number[],
  device: Tensor['device'],
): { batch: RaggedBatch; blockLen: number } {
  const blockLen = Math.max(1, lengths.reduce(gcd, 0))
  const columns = Math.max(1, ...lengths.map((n) => n / blockLen))
  const table = new Int32Array(lengths.length * columns)
  const starts = new Int32Array(lengths.length + 1)
  lengths.forEach((length, s) => {
    for (let i = 0; i < length / blockLen; i++) table[s * columns + i] = starts[s]! / blockLen + i
    starts[s + 1] = starts[s]! + length
  })
  return {
    blockLen,
    batch: {
      queryStarts: Tensor.from(starts, { device }),
      lengths: Tensor.from(Int32Array.from(lengths), { device }),
      blockTable: Tensor.from(table, { shape: [lengths.length, columns], device }),
    },
  }
}

function checkLengths(lengths: readonly number[], tokens: number): void {
  const sum = lengths.reduce((a, b) => a + b, 0)
  if (sum !== tokens || lengths.some((n) => !Number.isInteger(n) || n < 1)) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_SHAPE',
      `attention: sequences of ${lengths.join(', ')} tokens, ${tokens} rows; the lengths must be positive and add up`,
    )
  }
}

/**
 * softmax(q k^T / sqrt(D)) v within each of the packed sequences; q [T, H, D], k and v [T, KV, D] of one dtype, H a
 * multiple of KV. `lengths` are the sequences' tokens (default: one sequence). Causal unless told otherwise.
 */
export function packedAttention(
  q: Tensor,
  k: Tensor,
  v: Tensor,
  options: AttentionOptions & { lengths?: readonly number[] } = {},
): Tensor {
  const tokens = q.shape[0]!
  const { lengths = tokens > 0 ? [tokens] : [], ...rest } = options
  checkLengths(lengths, tokens)
  return tidy(() => {
    if (tokens === 0) return Tensor.empty([0, q.shape[1]!, v.shape[2]!], q.dtype, q.device)
    const { batch, blockLen } = packedBatch(lengths, q.device)
    const cache = (t: Tensor) => t.reshape(tokens / blockLen, blockLen, t.shape[1]!, t.shape[2]!)
    return pagedAttention(q, cache(k), cache(v), batch, rest)
  })
}

export interface SelfAttentionOptions {
  /** Heads of keys and values, each shared by numHeads / numKeyValueHeads query heads. Default numHeads. */
  numKeyValueHeads?: number
  /** Default hiddenSize / numHeads. */
  headDim?: number
  bias?: boolean
  causal?: boolean
  /** Base of rotary position embeddings over the whole head; without it there are none. */
  ropeTheta?: number
  dtype?: DType | undefined
  device?: Placement | undefined
}

/** Multi-head self-attention: x [T, hidden] to [T, hidden], through the linear layers q_proj, k_proj, v_proj, o_proj. */
export class SelfAttention extends Module {
  readonly numHeads: number
  readonly numKeyValueHeads: number
  readonly headDim: number
  readonly causal: boolean
  readonly ropeTheta: number | undefined
  q_proj: Linear
  k_proj: Linear
  v_proj: Linear
  o_proj: Linear

  constructor(hiddenSize: number, numHeads: number, options: SelfAttentionOptions = {}) {
    super()
    this.numHeads = numHeads
    this.numKeyValueHeads = options.numKeyValueHeads ?? numHeads
    this.headDim = options.headDim ?? hiddenSize / numHeads
    this.causal = options.causal ?? true
    this.ropeTheta = options.ropeTheta
    if (!Number.isInteger(this.headDim) || numHeads % this.numKeyValueHeads !== 0) {
      throw new HalfbyteError(
        'ERR_HALFBYTE_SHAPE',
        `SelfAttention: ${hiddenSize} features, ${numHeads} heads and ${this.numKeyValueHeads} key-value heads do not divide`,
      )
    }
    const { dtype, device, bias = false } = options
    const linear = (k: number, n: number) => new Linear(k, n, { bias, dtype, device })
    this.q_proj = linear(hiddenSize, numHeads * this.headDim)
    this.k_proj = linear(hiddenSize, this.numKeyValueHeads * this.headDim)
    this.v_proj = linear(hiddenSize, this.numKeyValueHeads * this.headDim)
    this.o_proj = linear(numHeads * this.headDim, hiddenSize)
  }

  /** `lengths`: the tokens of each sequence packed in x; default one sequence. */
  forward(x: Tensor, lengths: readonly number[] = x.shape[0]! > 0 ? [x.shape[0]!] : []): Tensor {
    checkLengths(lengths, x.shape[0]!)
    return tidy(() => {
      const heads = (t: Tensor, n: number) => t.reshape(x.shape[0]!, n, this.headDim)
      let q = heads(this.q_proj.forward(x), this.numHeads)
      let k = heads(this.k_proj.forward(x), this.numKeyValueHeads)
      const v = heads(this.v_proj.forward(x), this.numKeyValueHeads)
      if (this.ropeTheta !== undefined && x.shape[0]! > 0) {
        const { cos, sin } = ropeTables(this.#inverseFrequencies(x), Math.max(...lengths))
        const positions = raggedPositions(packedBatch(lengths, x.device).batch, x.shape[0]!)
        q = rope(q, cos, sin, positions)
        k = rope(k, cos, sin, positions)
      }
      const y = packedAttention(q, k, v, { lengths, causal: this.causal })
      return this.o_proj.forward(y.reshape(x.shape[0]!, this.numHeads * this.headDim))
    })
  }

  #inverseFrequencies(x: Tensor): Tensor {
    const half = this.headDim / 2
    const values = Float32Array.from({ length: half }, (_, i) => this.ropeTheta! ** (-i / half))
    return Tensor.from(values, { device: x.device })
  }
}
