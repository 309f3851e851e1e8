/** What a device has in use when nothing is under way any more. */
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import type { Device } from '../../lib'

setFlagsFromString('--expose-gc')
const collect = runInNewContext('gc') as () => void

/**
 * Bytes allocated when the work that is queued and what is freed behind it are over: the promise of a value may be
 * settled before its tensor's memory is back.
 */
export async function allocatedMemory(device: Device): Promise<number> {
  for (let round = 0; round < 2; round++) {
    await new Promise((resolve) => setImmediate(resolve))
    await device.synchronize()
  }
  return device.memoryUsage().allocated
}

/** The same without what earlier tests left to the garbage collector, and the peak set to it: to compare with. */
export async function baselineMemory(device: Device): Promise<number> {
  let bytes = await allocatedMemory(device)
  for (let before = Infinity; bytes < before;) {
    before = bytes
    collect()
    bytes = await allocatedMemory(device)
  }
  device.resetPeakMemory()
  return bytes
}
