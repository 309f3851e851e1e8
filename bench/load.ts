/** Loading a checkpoint, quantising on the way in or not, beside the mere reading of its files. */
import { closeSync, openSync, readdirSync, readSync } from 'node:fs'
import { join } from 'node:path'
import { getTrueFootprint } from 'halfbyte'
import { runAsProgram, type Benchmark, type Row } from './support/benchmark.js'
import { summarize } from './support/measure.js'
import { folderOf, forms, load as loadModel } from './support/models.js'

/** Reads every weight file once; returns the bytes. */
function readFiles(folder: string): number {
  const buffer = Buffer.allocUnsafe(4 << 20)
  let bytes = 0
  for (const name of readdirSync(folder).filter((file) => file.endsWith('.safetensors'))) {
    const file = openSync(join(folder, name), 'r')
    for (let n; (n = readSync(file, buffer)) > 0;) bytes += n
    closeSync(file)
  }
  return bytes
}

export const load: Benchmark = {
  name: 'load',
  summary: 'time and peak memory of fromPretrained(), files in the page cache',
  async run({ device, model: given, rounds }) {
    const folder = folderOf(given)
    const bytes = readFiles(folder)
    const samples = forms.map(() => [] as number[])
    const reading: number[] = []
    const facts = forms.map(() => ({ footprint: 0, peak: 0 }))
    for (let round = 0; round < rounds; round++) {
      const began = performance.now()
      readFiles(folder)
      reading.push((performance.now() - began) / 1e3)
      for (const [i, [, config]] of forms.entries()) {
        await device.synchronize()
        const before = device.memoryUsage().allocated
        device.resetPeakMemory()
        const start = performance.now()
        const model = await loadModel(folder, device, config)
        await device.synchronize()
        samples[i]!.push((performance.now() - start) / 1e3)
        facts[i] = { footprint: getTrueFootprint(model), peak: device.memoryUsage().peak - before }
        model.dispose()
      }
    }
    const baseline = summarize(reading).min
    const rows: Row[] = forms.map(([weights], i) => {
      const time = summarize(samples[i]!)
      return {
        weights,
        ms: time.min * 1e3,
        median_ms: time.median * 1e3,
        mb_per_s: bytes / time.min / 1e6,
        footprint_mb: facts[i]!.footprint / 1e6,
        peak_mb: facts[i]!.peak / 1e6,
        read_files_ms: baseline * 1e3,
      }
    })
    return {
      columns: {
        weights: 'weights',
        ms: 'ms',
        median_ms: 'median ms',
        mb_per_s: 'MB/s of file',
        footprint_mb: 'model MB',
        peak_mb: 'peak MB',
        read_files_ms: 'reading files ms',
      },
      rows,
      baseline: 'read_files_ms',
      notes: [`files: ${(bytes / 1e6).toFixed(1)} MB`],
    }
  },
}

runAsProgram(load, module)
