/** What part of the machine's measured limits a kernel reaches. */
import type { Device } from 'halfbyte'
import type { Row } from './benchmark.js'
import type { Peaks } from './machine.js'

export const shareColumns = {
  share_of_bandwidth: 'of read',
  share_of_fma_peak: 'of FMA peak',
}

/** Adds the shares to rows that have gb_per_s and gop_per_s, and returns the note that names the limits. */
export function addShares(rows: readonly Row[], peaks: Peaks, device: Device): string[] {
  if (device.type !== 'cpu') return []
  const { readBandwidth, fmaPeak } = peaks.best
  for (const row of rows) {
    row['share_of_bandwidth'] = (Number(row['gb_per_s']) * 1e9) / readBandwidth
    if (row['gop_per_s'] !== undefined) row['share_of_fma_peak'] = (Number(row['gop_per_s']) * 1e9) / fmaPeak
  }
  const read = (readBandwidth / 1e9).toFixed(1)
  const fma = (fmaPeak / 1e9).toFixed(0)
  return [`measured in this run: memory read ${read} GB/s, fp32 multiply-add ${fma} GFLOP/s`]
}
