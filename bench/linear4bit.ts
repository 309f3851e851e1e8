/**
 * y [M, N] = x [M, K] W^T with a 4-bit weight, beside the same product with the weight in float32. Weights are taken in
 * turn from more memory than the caches hold, as the layers of a model are.
 */
import { ops, type Tensor } from 'halfbyte'
import { runAsProgram, type Benchmark, type Row } from './support/benchmark.js'
import { coldCopies, Peaks } from './support/machine.js'
import { compare } from './support/measure.js'
import { normalTensor } from './support/random.js'

const N = 14336
const K = 4096
const BLOCK = 64

export const linear4bit: Benchmark = {
  name: 'linear4bit',
  summary: `NF4 linear layer, N x K = ${N} x ${K}, blocks of ${BLOCK}, float32 activations`,
  async run({ device, rounds }) {
    const dense = normalTensor([N, K], 0.02, device)
    const bytes = (N * K) / 2 + ((N * K) / BLOCK) * 4
    const packed: ops.Packed4[] = []
    for (let i = 0; i < coldCopies(bytes); i++) {
      packed.push({
        ...ops.quantizeBlocks4(dense, 'nf4', BLOCK),
        quantType: 'nf4',
        blocksize: BLOCK,
        n: N,
        k: K,
      })
    }
    await device.synchronize()

    const peaks = new Peaks()
    const rows: Row[] = []
    for (const m of [1, 4, 64]) {
      using x = normalTensor([m, K], 1, device, m)
      const drop = (y: Tensor) => y.dispose()
      const times = await compare(
        device,
        [
          {
            name: 'nf4',
            call: (i) => drop(ops.linear4bit(x, packed[i % packed.length]!)),
            calls: m < 16 ? 8 : 1,
          },
          { name: 'dense', call: () => drop(ops.linear(x, dense)), calls: 1 },
        ],
        { rounds: m < 16 ? 2 * rounds : rounds, betweenRounds: () => peaks.measure(device) },
      )
      const nf4 = times.get('nf4')!
      const baseline = times.get('dense')!
      rows.push({
        m,
        us: nf4.min * 1e6,
        median_us: nf4.median * 1e6,
        gb_per_s: bytes / nf4.min / 1e9,
        gflop_per_s: (2 * m * N * K) / nf4.min / 1e9,
        dense_fp32_us: baseline.min * 1e6,
        speedup: baseline.min / nf4.min,
      })
    }
    const { readBandwidth, fmaPeak } = peaks.best
    if (device.type === 'cpu') {
      for (const row of rows) {
        row['share_of_bandwidth'] = (Number(row['gb_per_s']) * 1e9) / readBandwidth
        row['share_of_fma_peak'] = (Number(row['gflop_per_s']) * 1e9) / fmaPeak
      }
    }
    return {
      columns: {
        m: 'M',
        us: 'us',
        median_us: 'median us',
        gb_per_s: 'GB/s',
        share_of_bandwidth: 'of read',
        gflop_per_s: 'GFLOP/s',
        share_of_fma_peak: 'of FMA peak',
        dense_fp32_us: 'dense fp32 us',
        speedup: 'times faster',
      },
      rows,
      baseline: 'dense_fp32_us',
      notes: [
        `weight: ${(bytes / 1e6).toFixed(1)} MB with its absmax, ${packed.length} of them in turn`,
        ...(device.type === 'cpu' ? [peakNote(readBandwidth, fmaPeak)] : []),
      ],
    }
  },
}

export function peakNote(readBandwidth: number, fmaPeak: number): string {
  return `measured in this run: memory read ${(readBandwidth / 1e9).toFixed(1)} GB/s, fp32 multiply-add ${(fmaPeak / 1e9).toFixed(0)} GFLOP/s`
}

runAsProgram(linear4bit, module)
