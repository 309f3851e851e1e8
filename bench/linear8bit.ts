/**
 * The LLM.int8() forward, y [M, N] = x [M, K] W^T with an int8 weight: quantising the rows of x, looking for outliers
 * and the product, beside the product with the weight in float32.
 */
import { ops } from 'halfbyte'
import { runAsProgram, type Benchmark } from './support/benchmark.js'
import { compareLinear, K, linearColumns, N } from './support/linear.js'

const BYTES = N * K + N * 4
const THRESHOLD = 6

export const linear8bit: Benchmark = {
  name: 'linear8bit',
  summary: `LLM.int8() linear layer, N x K = ${N} x ${K}, threshold ${THRESHOLD}, float32 activations`,
  async run(context) {
    const { rows, notes } = await compareLinear(context, BYTES, (dense) => {
      const { codes, rowAbsmax } = ops.int8QuantizeRows(dense)
      return (x) => ops.linear8bit(x, codes, rowAbsmax, { threshold: THRESHOLD })
    })
    return { columns: { ...linearColumns, gop_per_s: 'GOP/s' }, rows, baseline: 'dense_fp32_us', notes }
  },
}

runAsProgram(linear8bit, module)
