/** Linear layers on a GPU, over the shapes of Llama models of 8 and 70 billion parameters and any number of rows. */
import { denseLibrary, HalfbyteError, ops, type Device, type DType, type Tensor } from 'halfbyte'
import type { Context, Report, Row } from './benchmark.js'
import { relative } from './exact.js'
import { normalTensor } from './random.js'
import { coldCopiesOnGpu, copyBandwidth, timeReplays } from './replays.js'

/** N, K: q, k, v of 8B; its output projection; gate and up; down; 70B: output projection, gate and up, down. */
export const SHAPES: readonly (readonly [number, number])[] = [
  [6144, 4096],
  [4096, 4096],
  [28672, 4096],
  [4096, 14336],
  [8192, 8192],
  [57344, 8192],
  [8192, 28672],
]

/** Where cuBLASLt is: without it there is nothing to compare with. */
function requireDenseLibrary(): string {
  const { found, where } = denseLibrary()
  if (found) return where
  throw new HalfbyteError('ERR_HALFBYTE_UNSUPPORTED', `the baseline, cuBLASLt, is not there; tried ${where}`)
}

/** A random weight [N, K]. */
function randomWeight(n: number, k: number, device: Device, dtype: DType): Tensor {
  using wide = normalTensor([n, k], 0.02, device, n + k)
  return wide.to(dtype)
}

/** One layer in the form that is measured: `copies` of its weight in turn, of `bytes` each. */
interface Layer {
  bytes: number
  copies: number
  forward: (x: Tensor, copy: number) => Tensor
}

/** One whose results can be checked. */
export interface CheckedLayer extends Layer {
  /** Rows of the weight. */
  n: number
  /** Float values of row `n` of the weight. */
  row: (n: number) => Promise<Float32Array>
  /** What rows of x are multiplied with it as; x itself where that is not given. */
  inputs?: (x: Tensor, rows: readonly number[]) => Promise<Float32Array[]>
}

export function rowsOf(x: Tensor, rows: readonly number[]): Promise<Float32Array[]> {
  return Promise.all(rows.map((row) => x.slice(0, row, row + 1).floats()))
}

/** The dense product that the forms are compared with. */
function denseLayer(weight: Tensor): Layer & Disposable {
  const bytes = weight.nbytes
  const copies = coldCopiesOnGpu(bytes)
  const weights = [weight, ...Array.from({ length: copies - 1 }, () => weight.clone())]
  return {
    bytes,
    copies,
    forward: (x, copy) => ops.linear(x, weights[copy]!),
    [Symbol.dispose]: () => weights.slice(1).forEach((copy) => copy.dispose()),
  }
}

/** Seconds of each form of the layer, in turns. */
function timeLayers(
  device: Device,
  forms: readonly (readonly [Layer, Tensor])[],
  rounds: number,
): Promise<number[]> {
  const contenders = forms.map(([{ copies, forward }, x]) => ({ copies, call: (i: number) => forward(x, i) }))
  return timeReplays(device, contenders, rounds)
}

/** Relative error of a sample of the layer's results against sums in double precision. */
async function sampleError(layer: CheckedLayer, x: Tensor): Promise<number> {
  using y = layer.forward(x, layer.copies - 1)
  const [m, n] = y.shape as [number, number]
  const rows = [...new Set([0, 1, n >> 1, Math.floor(n * 0.7), n - 2, n - 1])]
  const tokens = [...new Set([0, m >> 1, m - 1])]
  const inputs = await (layer.inputs ?? rowsOf)(x, tokens)
  const results = await rowsOf(y, tokens)
  const found: number[] = []
  const expected: number[] = []
  for (const row of rows) {
    const weight = await layer.row(row)
    for (const [i, input] of inputs.entries()) {
      found.push(results[i]![row]!)
      expected.push(input.reduce((sum, value, at) => sum + value * weight[at]!, 0))
    }
  }
  return relative(found, expected)
}

/** A layer and its x, one row of the table. */
export interface Case {
  layer: CheckedLayer
  x: Tensor
  /** Values of the row that tell it from others of its shape. */
  values: Row
  /** Microseconds of the peer; undefined where it was not measured. */
  peer: number | undefined
  /** What the relative error must be less than. */
  limit: number
}

/** A form of the linear layer against the dense product. */
export interface Comparison<Weights extends Disposable> {
  name: string
  /** Of the dense product. */
  dtype: DType
  /** Key and heading of its time. */
  baseline: [string, string]
  /** Numbers of rows of x. */
  rows: readonly number[]
  /** Heading of the values of a case by their keys. */
  columns: Record<string, string>
  /** Key and heading of operations, of which a dense product has 2 M N K, in units of 1e12 per second. */
  rate: [string, string]
  peer: string
  make: (dense: Tensor) => Weights
  /** The cases of x float32 [M, K]; each is over when the next one is asked for. */
  cases: (weights: Weights, x: Tensor) => Iterable<Case>
}

/** Times every case of every shape, checks a sample of its results, and compares both with what the chip can. */
export async function compareOnGpu<Weights extends Disposable>(
  { device, rounds }: Context,
  comparison: Comparison<Weights>,
): Promise<Report> {
  const { name, dtype, baseline, rate } = comparison
  const library = requireDenseLibrary()
  const copy = await copyBandwidth(device, rounds)
  const rows: Row[] = []
  let worst = 0
  for (const [n, k] of SHAPES) {
    using dense = randomWeight(n, k, device, dtype)
    using denseOnly = denseLayer(dense)
    using weights = comparison.make(dense)
    for (const m of comparison.rows) {
      using x = normalTensor([m, k], 1, device, m)
      using narrow = x.to(dtype)
      for (const { layer, x: input, values, peer, limit } of comparison.cases(weights, x)) {
        const error = await sampleError(layer, input)
        if (!(error < limit)) {
          const where = `N ${n}, K ${k}, M ${m}, ${Object.values(values).join(', ')}`
          const message = `${name}: a result is wrong: ${where}: relative error ${error}, at most ${limit} was expected`
          throw new HalfbyteError('ERR_HALFBYTE_INTERNAL', message)
        }
        worst = Math.max(worst, error)
        const forms = [[denseOnly, narrow] as const, [layer, input] as const]
        const [denseSeconds, seconds] = (await timeLayers(device, forms, rounds)) as [number, number]
        rows.push({
          n,
          k,
          m,
          ...values,
          us: seconds * 1e6,
          tb_per_s: layer.bytes / seconds / 1e12,
          share: layer.bytes / seconds / copy,
          [rate[0]]: (2 * m * n * k) / seconds / 1e12,
          [baseline[0]]: denseSeconds * 1e6,
          speedup: denseSeconds / seconds,
          peer_us: peer ?? '-',
          error,
        })
      }
    }
  }
  return {
    columns: {
      n: 'N',
      k: 'K',
      m: 'M',
      ...comparison.columns,
      us: 'us',
      tb_per_s: 'TB/s',
      share: 'of copy',
      [rate[0]]: rate[1],
      [baseline[0]]: baseline[1],
      speedup: 'times faster',
      peer_us: 'bitsandbytes us',
    },
    rows,
    baseline: baseline[0],
    notes: [
      `copy in this run: ${(copy / 1e12).toFixed(2)} TB/s`,
      `${baseline[1].replace(/ us$/, '')}: dense product, by this library's own kernel for 1 and 2 rows, by ${library} for more`,
      `largest relative error of sampled results: ${worst.toExponential(1)}`,
      `bitsandbytes: ${comparison.peer}`,
    ],
  }
}
