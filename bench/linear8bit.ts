/**
 * The LLM.int8() forward, y [M, N] = x [M, K] W^T with an int8 weight: quantising the rows of x, looking for outliers
 * and the product, beside the product with a dense weight. On the CPU one shape with float32 activations; on a GPU the
 * shapes of Llama models, float16 and bfloat16, without and with outlier columns, by replays of graphs, with results
 * checked against double precision.
 */
import { ops, Tensor, type DType } from 'halfbyte'
import { runAsProgram, type Benchmark, type Context, type Report } from './support/benchmark.js'
import { compareLinear, K, linearColumns, N } from './support/linear.js'
import { compareOnGpu, rowsOf, type Case, type CheckedLayer } from './support/linear_cuda.js'
import { coldCopiesOnGpu } from './support/replays.js'
import peers from './peers/h200.json'

const THRESHOLD = 6
const ROWS = [1, 8, 16, 64, 128, 512, 2048, 4096, 8192]
/** Relative error of results rounded to the dtype. */
const FORMS: readonly (readonly [DType, number])[] = [
  ['float16', 1e-3],
  ['bfloat16', 5e-3],
]
/** Threshold, outlier columns, and the peer's time of it. */
const SETTINGS = [
  [0, 0, 'int8_t0_us'],
  [THRESHOLD, 0, 'int8_t6_none_us'],
  [THRESHOLD, 6, 'int8_t6_6cols_us'],
  [THRESHOLD, 64, undefined],
] as const

async function onCpu(context: Context): Promise<Report> {
  const { rows, notes } = await compareLinear(context, N * K + N * 4, (dense) => {
    const { codes, rowAbsmax } = ops.int8QuantizeRows(dense)
    return (x) => ops.linear8bit(x, codes, rowAbsmax, { threshold: THRESHOLD })
  })
  return { columns: { ...linearColumns, gop_per_s: 'GOP/s' }, rows, baseline: 'dense_fp32_us', notes }
}

interface Weights extends Disposable {
  layer: (threshold: number) => CheckedLayer
}

function quantisedLayers(dense: Tensor): Weights {
  const [n, k] = dense.shape as [number, number]
  const { codes, rowAbsmax: scb } = ops.int8QuantizeRows(dense, 0, true)
  const bytes = codes.nbytes + scb.nbytes
  const weights = Array.from({ length: coldCopiesOnGpu(bytes) }, (_, i) => (i === 0 ? codes : codes.clone()))
  const values = (row: Tensor, absmax: number) =>
    row.floats().then((q) => q.map((code) => (code * absmax) / 127))
  /** x as the product sees it: quantised, but for outlier columns. */
  const inputs = async (x: Tensor, threshold: number, rows: readonly number[]): Promise<Float32Array[]> => {
    const made = ops.int8QuantizeRows(x, threshold)
    using quantised = made.codes
    using absmax = made.rowAbsmax
    using mask = made.outlierMask ?? Tensor.zeros([k], 'uint8', x.device)
    const [plain, maxima, isOutlier] = [await rowsOf(x, rows), await absmax.floats(), await mask.floats()]
    const seen = await Promise.all(rows.map((row) => values(quantised.slice(0, row, row + 1), maxima[row]!)))
    return seen.map((row, i) => row.map((value, column) => (isOutlier[column] ? plain[i]![column]! : value)))
  }
  return {
    layer: (threshold) => ({
      n,
      bytes,
      copies: weights.length,
      forward: (x, copy) => ops.linear8bit(x, weights[copy]!, scb, { threshold }),
      row: async (row) =>
        values(codes.slice(0, row, row + 1), (await scb.slice(0, row, row + 1).floats())[0]!),
      inputs: (x, rows) => inputs(x, threshold, rows),
    }),
    [Symbol.dispose]: () => {
      for (const owned of [...weights, scb]) owned.dispose()
    },
  }
}

/** x with `count` columns that are far from zero in every row. */
function withOutliers(x: Tensor, count: number): Tensor {
  const k = x.shape[1]!
  const offsets = new Float32Array(k)
  for (let i = 0; i < count; i++) offsets[Math.floor(((i + 0.5) * k) / count)] = i % 2 ? 20 : -20
  using row = Tensor.from(offsets, { device: x.device })
  return ops.add(x, row)
}

function* cases({ layer }: Weights, wide: Tensor): Iterable<Case> {
  const [m, k] = wide.shape as [number, number]
  for (const [threshold, outliers, peerKey] of SETTINGS) {
    const checked = layer(threshold)
    const peer = peers.linear8bit.find((p) => p.N === checked.n && p.K === k && p.M === m)
    using input = withOutliers(wide, outliers)
    for (const [dtype, limit] of FORMS) {
      using x = input.to(dtype)
      const values = { dtype, threshold, outliers }
      yield {
        layer: checked,
        x,
        values,
        peer: peerKey && dtype === 'float16' ? peer?.[peerKey] : undefined,
        limit,
      }
    }
  }
}

function onGpu(context: Context): Promise<Report> {
  return compareOnGpu(context, {
    name: 'linear8bit',
    dtype: 'float16',
    baseline: ['fp16_us', 'fp16 us'],
    rows: ROWS,
    columns: { dtype: 'x', threshold: 'threshold', outliers: 'outlier columns' },
    rate: ['top_per_s', 'TOP/s'],
    peer: peers.machine,
    make: quantisedLayers,
    cases,
  })
}

export const linear8bit: Benchmark = {
  name: 'linear8bit',
  summary: `LLM.int8() linear layer, threshold ${THRESHOLD}`,
  run: (context) => (context.device.type === 'cuda' ? onGpu(context) : onCpu(context)),
}

runAsProgram(linear8bit, module)
