/**
 * Times of queued work. A sample is the time of several calls, from the first enqueue to the end of the last, divided
 * by their number. Things that are compared are measured in turn, round after round, so that a disturbance of the
 * machine meets all of them; the minimum of the rounds is the figure, the median says how noisy it was.
 */
import { HalfbyteError, type Device, type Tensor } from 'halfbyte'

export interface Contender {
  name: string
  /** Queues call number `i`; its result is disposed here. */
  call: (i: number) => Tensor
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
  call: (i: number) => Tensor,
  calls: number,
  first: number,
): Promise<number> {
  const began = performance.now()
  for (let i = 0; i < calls; i++) call(first + i).dispose()
  await device.synchronize()
  return (performance.now() - began) / 1e3 / calls
}

/** Runs the contender once and looks at what it made: a time without a result is worth nothing. */
async function prove({ name, call }: Contender): Promise<void> {
  using result = call(0)
  using values = result.to('float32')
  if (!(await values.data()).every((value) => Number.isFinite(Number(value)))) {
    throw new HalfbyteError('ERR_HALFBYTE_INTERNAL', `${name} gave numbers that are not finite`)
  }
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
  for (const contender of contenders) {
    const { name, call, calls } = contender
    await prove(contender)
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
