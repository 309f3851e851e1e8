/**
 * Loading a checkpoint, quantising on the way in or not, beside the mere reading of its files. For a checkpoint of size:
 * `node dist/bench/support/checkpoint.js DIR` writes one of 16 GB, `halfbyte bench load --model DIR --rounds 3` reads it.
 */
import { availableParallelism } from 'node:os'
import { AutoModelForCausalLM, getTrueFootprint, type Device } from 'halfbyte'
import { runAsProgram, type Benchmark, type Row } from './support/benchmark.js'
import { summarize } from './support/measure.js'
import { folderOf, forms } from './support/models.js'
import { bytesIn, secondsToRead, weightFiles } from './support/reading.js'

interface Sample {
  seconds: number
  /** Bytes of the model, their peak on the device, and what the process took of main memory meanwhile. */
  footprint: number
  peak: number
  host: number
}

/** Loads once. Main memory is looked at every few milliseconds. */
async function measure(
  folder: string,
  device: Device,
  quantizationConfig: (typeof forms)[number][1],
): Promise<Sample> {
  await device.synchronize()
  const before = device.memoryUsage().allocated
  device.resetPeakMemory()
  const resident = process.memoryUsage.rss()
  let most = resident
  const look = () => (most = Math.max(most, process.memoryUsage.rss()))
  const timer = setInterval(look, 5)
  const began = performance.now()
  const model = await AutoModelForCausalLM.fromPretrained(folder, { device, quantizationConfig })
  await device.synchronize()
  const seconds = (performance.now() - began) / 1e3
  look()
  clearInterval(timer)
  const sample = {
    seconds,
    footprint: getTrueFootprint(model),
    peak: device.memoryUsage().peak - before,
    host: most - resident,
  }
  model.dispose()
  return sample
}

export const load: Benchmark = {
  name: 'load',
  summary:
    'time and peak memory of fromPretrained() beside the reading of its files, which are in the page cache',
  async run({ device, model: given, rounds }) {
    const folder = folderOf(given)
    const files = weightFiles(folder)
    const bytes = bytesIn(files)
    const threads = [1, Math.max(2, Math.min(8, availableParallelism()))]
    const readings = threads.map(() => [] as number[])
    const samples = forms.map(() => [] as Sample[])
    await secondsToRead(files, threads.at(-1)!) // brings them into the page cache
    for (let round = 0; round < rounds; round++) {
      for (const [i, count] of threads.entries()) readings[i]!.push(await secondsToRead(files, count))
      for (const [i, [, config]] of forms.entries()) {
        samples[i]!.push(await measure(folder, device, config))
      }
    }
    const rates = readings.map((times) => bytes / summarize(times).min)
    const fastest = Math.max(...rates)
    const rows: Row[] = forms.map(([weights], i) => {
      const time = summarize(samples[i]!.map(({ seconds }) => seconds))
      const most = (field: 'footprint' | 'peak' | 'host') =>
        Math.max(...samples[i]!.map((s) => s[field])) / 1e6
      return {
        weights: weights === 'float32' ? 'as they are' : weights,
        ms: time.min * 1e3,
        median_ms: time.median * 1e3,
        mb_per_s: bytes / time.min / 1e6,
        share: bytes / time.min / fastest,
        footprint_mb: most('footprint'),
        peak_mb: most('peak'),
        host_mb: most('host'),
        read_files_ms: (bytes / fastest) * 1e3,
      }
    })
    return {
      columns: {
        weights: 'weights',
        ms: 'ms',
        median_ms: 'median ms',
        mb_per_s: 'MB/s of file',
        share: 'of reading',
        footprint_mb: 'model MB',
        peak_mb: 'peak MB',
        host_mb: 'main memory MB',
        read_files_ms: 'reading files ms',
      },
      rows,
      baseline: 'read_files_ms',
      notes: [
        `files: ${(bytes / 1e6).toFixed(1)} MB, read at ` +
          threads
            .map(
              (count, i) => `${(rates[i]! / 1e6).toFixed(0)} MB/s by ${count} thread${count > 1 ? 's' : ''}`,
            )
            .join(', '),
      ],
    }
  },
}

runAsProgram(load, module)
