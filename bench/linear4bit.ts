/**
 * y [M, N] = x [M, K] W^T with a 4-bit weight, beside the same product with a dense weight. Weights are taken in turn
 * from more memory than the caches hold, as the layers of a model are. On the CPU one shape with float32 activations; on
 * a GPU the shapes of Llama models, bfloat16, by replays of graphs, with results checked against double precision.
 */
import { functional, ops, type Tensor } from 'halfbyte'
import { runAsProgram, type Benchmark, type Context, type Report } from './support/benchmark.js'
import { compareLinear, K, linearColumns, N } from './support/linear.js'
import { compareOnGpu, type Case, type CheckedLayer } from './support/linear_cuda.js'
import { coldCopiesOnGpu } from './support/replays.js'
import peers from './peers/h200.json'

const BLOCK = 64
const ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
/** The rounding of weight and result to bfloat16. */
const WORST_ERROR = 5e-3

async function onCpu(context: Context): Promise<Report> {
  const bytes = (N * K) / 2 + ((N * K) / BLOCK) * 4
  const { rows, notes } = await compareLinear(context, bytes, (dense) => {
    const { codes, absmax } = ops.quantizeBlocks4(dense, 'nf4', BLOCK)
    const weight: ops.Packed4 = { codes, absmax, quantType: 'nf4', blocksize: BLOCK, n: N, k: K }
    return (x) => ops.linear4bit(x, weight)
  })
  return { columns: { ...linearColumns, gop_per_s: 'GFLOP/s' }, rows, baseline: 'dense_fp32_us', notes }
}

/** `dense` in NF4, in the layout of its device. */
function packedLayer(dense: Tensor, compressStatistics: boolean): CheckedLayer & Disposable {
  const [n, k] = dense.shape as [number, number]
  const made = functional.quantize4bit(dense, { quantType: 'nf4', compressStatistics })
  const layout = ops.bestLayout4(dense.device, n, k, BLOCK)
  const { codes, state } = made.state.withLayout(made.codes, layout)
  made.codes.dispose()
  made.state.dispose()
  const bytes = codes.nbytes + state.absmax.nbytes + (state.state2?.absmax.nbytes ?? 0)
  const copies = coldCopiesOnGpu(bytes)
  const first = state.packed(codes)
  const weights = Array.from({ length: copies }, (_, i) =>
    i === 0 ? first : { ...first, codes: codes.clone(), absmax: state.absmax.clone() },
  )
  const values = ops.dequantizeBlocks4(first, 'float32')
  return {
    n,
    bytes,
    copies,
    forward: (x, copy) => ops.linear4bit(x, weights[copy]!),
    row: (row) => values.slice(0, row, row + 1).floats(),
    [Symbol.dispose]: () => {
      for (const weight of weights.slice(1)) {
        weight.codes.dispose()
        weight.absmax.dispose()
      }
      for (const owned of [values, codes, state]) owned.dispose()
    },
  }
}

interface Weights extends Disposable {
  plain: CheckedLayer
  nested: CheckedLayer
}

function packedLayers(dense: Tensor): Weights {
  const plain = packedLayer(dense, false)
  const nested = packedLayer(dense, true)
  return {
    plain,
    nested,
    [Symbol.dispose]: () => {
      plain[Symbol.dispose]()
      nested[Symbol.dispose]()
    },
  }
}

function* cases({ plain, nested }: Weights, wide: Tensor): Iterable<Case> {
  using x = wide.to('bfloat16')
  const [m, k] = x.shape as [number, number]
  const peer = peers.linear4bit.find((p) => p.N === plain.n && p.K === k && p.M === m)
  yield { layer: plain, x, values: { weight: 'nf4' }, peer: peer?.nf4_us, limit: WORST_ERROR }
  const nestedPeer = (peer as { nf4dq_us?: number } | undefined)?.nf4dq_us
  yield { layer: nested, x, values: { weight: 'nf4 dq' }, peer: nestedPeer, limit: WORST_ERROR }
}

function onGpu(context: Context): Promise<Report> {
  return compareOnGpu(context, {
    name: 'linear4bit',
    dtype: 'bfloat16',
    baseline: ['bf16_us', 'bf16 us'],
    rows: ROWS,
    columns: { weight: 'weight' },
    rate: ['tflop_per_s', 'TFLOP/s'],
    peer: peers.machine,
    make: packedLayers,
    cases,
  })
}

export const linear4bit: Benchmark = {
  name: 'linear4bit',
  summary: `NF4 linear layer, blocks of ${BLOCK}`,
  run: (context) => (context.device.type === 'cuda' ? onGpu(context) : onCpu(context)),
}

runAsProgram(linear4bit, module)
