/**
 * Times of queued work. A sample is the time of several calls, from the first enqueue to the end of the last, divided
 * by their number. Things that are compared are measured in turn, round after round, so that a disturbance of the
 * machine meets all of them; the minimum of the rounds is the figure, the median says how noisy it was.
 */
import type { Device } from 'halfbyte'

export interface Contender {
  name: string
  /** Queues call number `i`. */
  call: (i: number) => void
  /** Calls in a sample. Default: as many as take about 20 ms. */
  calls?: number
}

export interface Timing {
  /** Seconds per call. */
  min: number
  median: number
  samples: number
}

async function sample(
  device: Device,
  call: (i: number) => void,
  calls: number,
  first: number,
): Promise<number> {
  const began = performance.now()
  for (let i = 0; i < calls; i++) call(first + i)
  await device.synchronize()
  return (performance.now() - began) / 1e3 / calls
}

export function summarize(samples: readonly number[]): Timing {
  const sorted = [...samples].sort((a, b) => a - b)
  const middle = sorted.length >> 1
  const median = sorted.length % 2 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2
  return { min: sorted[0]!, median, samples: sorted.length }
}

export async function compare(
  device: Device,
  contenders: readonly Contender[],
  options: { rounds: number; betweenRounds?: () => Promise<void> },
): Promise<Map<string, Timing>> {
  const samples = new Map<string, number[]>()
  const plan = []
  for (const { name, call, calls } of contenders) {
    const once = await sample(device, call, 1, 0) // also warms up
    plan.push({ name, call, calls: calls ?? Math.max(1, Math.min(1000, Math.round(0.02 / once))), done: 1 })
    samples.set(name, [])
  }
  for (let round = 0; round < options.rounds; round++) {
    await options.betweenRounds?.()
    for (const entry of plan) {
      samples.get(entry.name)!.push(await sample(device, entry.call, entry.calls, entry.done))
      entry.done += entry.calls
    }
  }
  return new Map([...samples].map(([name, times]) => [name, summarize(times)]))
}
