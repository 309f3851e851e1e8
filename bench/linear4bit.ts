/**
 * y [M, N] = x [M, K] W^T with a 4-bit weight, beside the same product with the weight in float32. Weights are taken in
 * turn from more memory than the caches hold, as the layers of a model are.
 */
import { ops } from 'halfbyte'
import { runAsProgram, type Benchmark } from './support/benchmark.js'
import { compareLinear, K, linearColumns, N } from './support/linear.js'

const BLOCK = 64
const BYTES = (N * K) / 2 + ((N * K) / BLOCK) * 4

export const linear4bit: Benchmark = {
  name: 'linear4bit',
  summary: `NF4 linear layer, N x K = ${N} x ${K}, blocks of ${BLOCK}, float32 activations`,
  async run(context) {
    const { rows, notes } = await compareLinear(context, BYTES, (dense) => {
      const { codes, absmax } = ops.quantizeBlocks4(dense, 'nf4', BLOCK)
      const weight: ops.Packed4 = { codes, absmax, quantType: 'nf4', blocksize: BLOCK, n: N, k: K }
      return (x) => ops.linear4bit(x, weight)
    })
    return { columns: { ...linearColumns, gop_per_s: 'GFLOP/s' }, rows, baseline: 'dense_fp32_us', notes }
  },
}

runAsProgram(linear4bit, module)
