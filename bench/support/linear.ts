/** One linear layer in a quantised form against itself in float32, for 1, 4 and 64 rows. */
import { ops, type Tensor } from 'halfbyte'
import type { Context, Row } from './benchmark.js'
import { coldCopies, Peaks } from './machine.js'
import { compare } from './measure.js'
import { normalTensor } from './random.js'
import { addShares, shareColumns } from './shares.js'

/** The MLP of an 8-billion-parameter Llama. */
export const N = 14336
export const K = 4096
const ROWS = [1, 4, 64]

export const linearColumns = {
  m: 'M',
  us: 'us',
  median_us: 'median us',
  gb_per_s: 'GB/s',
  share_of_bandwidth: shareColumns.share_of_bandwidth,
  gop_per_s: 'GOP/s',
  share_of_fma_peak: shareColumns.share_of_fma_peak,
  dense_fp32_us: 'dense fp32 us',
  speedup: 'times faster',
}

/**
 * `make` quantises the weight, of `bytes` then, and returns the forward. It is called for as many weights as are more
 * than the caches hold, and they are used in turn, as the layers of a model are.
 */
export async function compareLinear(
  { device, rounds }: Context,
  bytes: number,
  make: (dense: Tensor) => (x: Tensor) => Tensor,
): Promise<{ rows: Row[]; notes: string[] }> {
  const dense = normalTensor([N, K], 0.02, device)
  const layers = Array.from({ length: coldCopies(bytes) }, () => make(dense))
  await device.synchronize()
  const peaks = new Peaks()
  const rows: Row[] = []
  for (const m of ROWS) {
    using x = normalTensor([m, K], 1, device, m)
    const times = await compare(
      device,
      [
        { name: 'quantised', call: (i) => layers[i % layers.length]!(x), calls: m < 16 ? layers.length : 1 },
        { name: 'dense', call: () => ops.linear(x, dense), calls: 1 },
      ],
      { rounds: m < 16 ? 2 * rounds : rounds, betweenRounds: () => peaks.measure(device) },
    )
    const { min, median } = times.get('quantised')!
    const baseline = times.get('dense')!.min
    rows.push({
      m,
      us: min * 1e6,
      median_us: median * 1e6,
      gb_per_s: bytes / min / 1e9,
      gop_per_s: (2 * m * N * K) / min / 1e9,
      dense_fp32_us: baseline * 1e6,
      speedup: baseline / min,
    })
  }
  const limits = addShares(rows, peaks, device)
  const weights = `weight: ${(bytes / 1e6).toFixed(1)} MB with its scales, ${layers.length} of them in turn`
  return { rows, notes: [weights, ...limits] }
}
