/** What the library found on this machine, and yardsticks to hold its speed against. */
import { bindingPath, native } from '../native.js'
import { cudaProblem, versionName } from './cuda.js'
import { rethrowAsync } from './rethrow.js'

export interface SystemInfo {
  /** Version of the addon and the file it was loaded from. */
  version: string
  binding: string
  /** What the CPU kernels run on, and which setting of the environment was not obeyed, and why ('' for none). */
  cpu: { isa: string; vnni: boolean; threads: number; complaint: string }
  /** compiled: the binary has CUDA kernels. reason: why there is no CUDA device ('' when there is one). */
  cuda: { compiled: boolean; archs: string; driver: string; runtime: string; reason: string }
  devices: string[]
}

export function systemInfo(): SystemInfo {
  const { isa, vnni, threads, isaComplaint, threadsComplaint } = native.cpuInfo()
  const facts = native.cudaInfo()
  return {
    version: native.version,
    binding: bindingPath,
    cpu: { isa, vnni, threads, complaint: [isaComplaint, threadsComplaint].filter(Boolean).join('; ') },
    cuda: {
      compiled: facts.compiled,
      archs: facts.archs,
      driver: versionName(facts.driver),
      runtime: versionName(facts.runtime),
      reason: cudaProblem(facts)?.reason ?? '',
    },
    devices: native.devices(),
  }
}

/** The library that dense products on CUDA run on: its path, or what was tried. Without it they run on own kernels. */
export function denseLibrary(): { found: boolean; where: string } {
  return native.denseLibrary()
}

export interface CpuPeaks {
  /** Bytes per second that all threads together read from memory (not from a cache). */
  readBandwidth: number
  /** fp32 operations per second of all threads on registers; a multiply-add counts two. */
  fmaPeak: number
}

/** Measures the limits of the CPU device, in about a third of a second. The best of a few tries, as noise only slows. */
export async function measureCpu(): Promise<CpuPeaks> {
  const [readBandwidth, fmaPeak] = await rethrowAsync(native.cpuPeaks())
  return { readBandwidth: readBandwidth!, fmaPeak: fmaPeak! }
}
