/**
 * Times on a GPU: calls are captured in a graph and replayed, so that what is measured is the device and not the host
 * that feeds it. A graph takes its operands in turn from more memory than the caches hold.
 */
import { ops, Tensor, type Device, type Graph } from 'halfbyte'
import { summarize } from './measure.js'
import { normalTensor } from './random.js'

/** Operands that are taken in turn come to at least so many bytes. */
const COLD_BYTES = 320e6
/** A graph takes at least so long, or the gaps between replays would show. */
const GRAPH_SECONDS = 2e-3
/** Contenders are at work for so long before they are measured, while the GPU lowers its clock. */
const WARM_MS = 100

export function coldCopiesOnGpu(bytes: number): number {
  return Math.max(2, Math.ceil(COLD_BYTES / bytes))
}

/** What is timed: `call(i)` queues one call on the i-th of `copies` sets of operands and gives its result. */
export interface Replayed {
  copies: number
  call: (i: number) => { dispose(): void }
}

/** A graph of so many calls. So many results are there at once as `live` says, and are written to in turn. */
function record(device: Device, { copies, call }: Replayed, calls: number, live: number): Graph {
  return device.capture(() => {
    const results: { dispose(): void }[] = []
    for (let i = 0; i < calls; i++) {
      results.push(call(i % copies))
      if (results.length >= live) results.shift()!.dispose()
    }
    for (const result of results) result.dispose()
  })
}

/** Seconds of so many replays of a graph. */
async function secondsOf(device: Device, graph: Graph, replays: number): Promise<number> {
  const began = performance.now()
  for (let i = 0; i < replays; i++) graph.replay()
  await device.synchronize()
  return (performance.now() - began) / 1e3
}

/**
 * Median seconds per call of each contender, over `rounds` samples that they take in turn, there and back: a GPU under
 * load lowers its clock, for all of them alike, and some time after what heated it. `live`: as many as `copies` where
 * results are as large as operands.
 */
export async function timeReplays(
  device: Device,
  contenders: readonly Replayed[],
  rounds: number,
  live = 1,
): Promise<number[]> {
  const ready: { graph: Graph; calls: number; replays: number; samples: number[] }[] = []
  try {
    for (const contender of contenders) {
      contender.call(0).dispose() // loads the kernel
      await device.synchronize()
      const { copies } = contender
      using rough = record(device, contender, copies, live)
      await secondsOf(device, rough, 1)
      const seconds = await secondsOf(device, rough, 1)
      const turns = Math.max(1, Math.ceil(GRAPH_SECONDS / seconds))
      const graph = record(device, contender, copies * turns, live)
      const replays = Math.max(1, Math.round(10e-3 / (seconds * turns)))
      ready.push({ graph, calls: copies * turns * replays, replays, samples: [] })
      await secondsOf(device, graph, 1)
    }
    const warm = performance.now() + WARM_MS
    while (performance.now() < warm) {
      for (const { graph, replays } of ready) await secondsOf(device, graph, replays)
    }
    for (let round = 0; round < rounds; round++) {
      for (const { graph, calls, replays, samples } of round % 2 ? ready.toReversed() : ready)
        samples.push((await secondsOf(device, graph, replays)) / calls)
    }
    return ready.map(({ samples }) => summarize(samples).median)
  } finally {
    for (const { graph } of ready) graph.dispose()
  }
}

/** Bytes read and written per second by a copy of 512 MB; not in a graph, where copies run on another engine. */
export async function copyBandwidth(device: Device, rounds: number): Promise<number> {
  const bytes = 512 * 2 ** 20
  using source = normalTensor([bytes / 4], 1, device)
  using target = Tensor.empty(source.shape, 'float32', device)
  const copies = 16
  const samples = []
  for (let round = 0; round <= rounds; round++) {
    await device.synchronize()
    const began = performance.now()
    for (let i = 0; i < copies; i++) ops.copyInto(target, source)
    await device.synchronize()
    samples.push((performance.now() - began) / 1e3 / copies)
  }
  return (2 * bytes) / summarize(samples.slice(1)).median
}
