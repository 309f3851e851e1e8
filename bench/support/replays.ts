/**
 * Times on a GPU: calls are captured in a graph and replayed, so that what is measured is the device and not the host
 * that feeds it. A graph takes its operands in turn from more memory than the caches hold.
 */
import { ops, Tensor, type Device } from 'halfbyte'
import { summarize } from './measure.js'
import { normalTensor } from './random.js'

/** Operands that are taken in turn come to at least so many bytes. */
const COLD_BYTES = 320e6
/** A graph takes at least so long, or the gaps between replays would show. */
const GRAPH_SECONDS = 2e-3

export function coldCopiesOnGpu(bytes: number): number {
  return Math.max(2, Math.ceil(COLD_BYTES / bytes))
}

/**
 * Median seconds per call over `rounds` samples; `call(i)` queues one and gives its result. So many results are there at
 * once as `live` says, and are written to in turn: as many as `copies` where results are as large as operands.
 */
export async function timeReplays(
  device: Device,
  copies: number,
  call: (i: number) => { dispose(): void },
  rounds: number,
  live = 1,
): Promise<number> {
  const once = async (calls: number, replays: number): Promise<number> => {
    using graph = device.capture(() => {
      const results: { dispose(): void }[] = []
      for (let i = 0; i < calls; i++) {
        results.push(call(i % copies))
        if (results.length >= live) results.shift()!.dispose()
      }
      for (const result of results) result.dispose()
    })
    graph.replay()
    await device.synchronize()
    const samples = []
    for (let round = 0; round < rounds; round++) {
      const began = performance.now()
      for (let i = 0; i < replays; i++) graph.replay()
      await device.synchronize()
      samples.push((performance.now() - began) / 1e3 / replays / calls)
    }
    return summarize(samples).median
  }
  call(0).dispose() // loads the kernel
  await device.synchronize()
  const rough = await once(copies, 1)
  const turns = Math.max(1, Math.ceil(GRAPH_SECONDS / (rough * copies)))
  return once(copies * turns, Math.max(1, Math.round(10e-3 / (rough * copies * turns))))
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
