/** The machine that a benchmark ran on, and its limits as measured in the same run. */
import { readFileSync } from 'node:fs'
import { cpus } from 'node:os'
import { measureCpu, systemInfo, type CpuPeaks, type Device } from 'halfbyte'

export interface Machine {
  cpu: string
  isa: string
  threads: number
  lastLevelCacheBytes: number
  node: string
  devices: string[]
}

/** Bytes of the largest cache; 32 MiB where the system does not say. */
export function lastLevelCacheBytes(): number {
  for (const index of [3, 2]) {
    try {
      const text = readFileSync(`/sys/devices/system/cpu/cpu0/cache/index${index}/size`, 'utf8').trim()
      const [, number, unit] = /^(\d+)([KMG]?)$/.exec(text)!
      return Number(number) * { '': 1, K: 1 << 10, M: 1 << 20, G: 1 << 30 }[unit as '' | 'K' | 'M' | 'G']
    } catch {
      continue
    }
  }
  return 32 << 20
}

export function machine(): Machine {
  const info = systemInfo()
  return {
    cpu: cpus()[0]?.model.trim() ?? 'unknown',
    isa: info.cpu.isa + (info.cpu.vnni ? ' + VNNI' : ''),
    threads: info.cpu.threads,
    lastLevelCacheBytes: lastLevelCacheBytes(),
    node: process.version,
    devices: info.devices,
  }
}

/** How many operands of `bytes` make a round through them come from memory, not from a cache. */
export function coldCopies(bytes: number): number {
  return Math.max(1, Math.ceil((4 * lastLevelCacheBytes()) / bytes))
}

/** The best figures that repeated measurements of the CPU's limits gave. */
export class Peaks {
  #best: CpuPeaks = { readBandwidth: 0, fmaPeak: 0 }

  async measure(device: Device): Promise<void> {
    if (device.type !== 'cpu') return
    const { readBandwidth, fmaPeak } = await measureCpu()
    this.#best = {
      readBandwidth: Math.max(this.#best.readBandwidth, readBandwidth),
      fmaPeak: Math.max(this.#best.fmaPeak, fmaPeak),
    }
  }

  get best(): CpuPeaks {
    return this.#best
  }
}
