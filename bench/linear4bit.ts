/**
 * y [M, N] = x [M, K] W^T with a 4-bit weight, beside the same product with a dense weight. Weights are taken in turn
 * from more memory than the caches hold, as the layers of a model are. On the CPU one shape with float32 activations; on
 * a GPU the shapes of Llama models, bfloat16, by replays of graphs, with results checked against double precision.
 */
import { functional, HalfbyteError, ops, type Tensor } from 'halfbyte'
import { runAsProgram, type Benchmark, type Context, type Report, type Row } from './support/benchmark.js'
import { compareLinear, K, linearColumns, N } from './support/linear.js'
import {
  denseLayer,
  randomWeight,
  requireDenseLibrary,
  sampleError,
  SHAPES,
  timeLayer,
  type CheckedLayer,
} from './support/linear_cuda.js'
import { normalTensor } from './support/random.js'
import { coldCopiesOnGpu, copyBandwidth } from './support/replays.js'
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

async function onGpu({ device, rounds }: Context): Promise<Report> {
  const library = requireDenseLibrary()
  const copy = await copyBandwidth(device, rounds)
  const rows: Row[] = []
  let worst = 0
  for (const [n, k] of SHAPES) {
    using dense = randomWeight(n, k, device, 'bfloat16')
    using baseline = denseLayer(dense)
    using plain = packedLayer(dense, false)
    using nested = packedLayer(dense, true)
    for (const m of ROWS) {
      using wide = normalTensor([m, k], 1, device, m)
      using x = wide.to('bfloat16')
      const bf16 = await timeLayer(device, baseline, x, rounds)
      const peer = peers.linear4bit.find((p) => p.N === n && p.K === k && p.M === m)
      for (const [name, layer, peerTime] of [
        ['nf4', plain, peer?.nf4_us],
        ['nf4 dq', nested, (peer as { nf4dq_us?: number } | undefined)?.nf4dq_us],
      ] as const) {
        const error = await sampleError(layer, x)
        worst = Math.max(worst, error)
        const seconds = await timeLayer(device, layer, x, rounds)
        rows.push({
          n,
          k,
          m,
          weight: name,
          us: seconds * 1e6,
          tb_per_s: layer.bytes / seconds / 1e12,
          share: layer.bytes / seconds / copy,
          tflop_per_s: (2 * m * n * k) / seconds / 1e12,
          bf16_us: bf16 * 1e6,
          speedup: bf16 / seconds,
          peer_us: peerTime ?? '-',
          error,
        })
      }
    }
  }
  if (!(worst < WORST_ERROR)) {
    const message = `linear4bit: a result is wrong: relative error ${worst}, at most ${WORST_ERROR} was expected`
    throw new HalfbyteError('ERR_HALFBYTE_INTERNAL', message)
  }
  return {
    columns: {
      n: 'N',
      k: 'K',
      m: 'M',
      weight: 'weight',
      us: 'us',
      tb_per_s: 'TB/s',
      share: 'of copy',
      tflop_per_s: 'TFLOP/s',
      bf16_us: 'bf16 us',
      speedup: 'times faster',
      peer_us: 'bitsandbytes us',
    },
    rows,
    baseline: 'bf16_us',
    notes: [
      `copy in this run: ${(copy / 1e12).toFixed(2)} TB/s`,
      `bf16: dense product, by this library's own kernel for 1 and 2 rows, by ${library} for more`,
      `largest relative error of sampled results: ${worst.toExponential(1)}`,
      `bitsandbytes: ${peers.machine}`,
    ],
  }
}

export const linear4bit: Benchmark = {
  name: 'linear4bit',
  summary: `NF4 linear layer, blocks of ${BLOCK}`,
  run: (context) => (context.device.type === 'cuda' ? onGpu(context) : onCpu(context)),
}

runAsProgram(linear4bit, module)
