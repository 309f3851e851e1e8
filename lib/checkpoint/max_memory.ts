/** Names of the places that a model's parts may go to, and how much each of them may hold. */
import { HalfbyteError } from '../errors.js'
import { Device, device as openDevice, devices } from '../tensor/device.js'

/** Bytes by device: 0 or 'cuda:0', 'cpu', 'cpu:1', 'disk'. A size is a number of bytes or a text like '10GiB'. */
export type MaxMemory = Readonly<Record<string | number, number | string>>

/** What a device map may name: 'cuda:1', 'cpu', 'disk', or a number N for 'cuda:N'. */
export type PlaceLike = string | number | Device

/** Not a device: weights stay in a file and are read whenever they are needed. */
export const DISK = 'disk'

function refuse(what: string): never {
  throw new HalfbyteError('ERR_HALFBYTE_VALUE', what)
}

/** The name of a place as this library writes it; whether the device is there is not looked at. */
export function placeName(like: PlaceLike, where = 'deviceMap'): string {
  if (like instanceof Device) return like.name
  const text = String(like)
  if (/^\d+$/.test(text)) return `cuda:${Number(text)}`
  if (text === 'cuda') return 'cuda:0'
  if (text === 'cpu:0') return 'cpu'
  if (text === DISK || /^(cpu|cuda:\d+|cpu:\d+)$/.test(text)) return text
  return refuse(
    `${where}: ${JSON.stringify(like)} is not a place for modules; the places are N or 'cuda:N', 'cpu', 'cpu:N' and 'disk'`,
  )
}

/** Whether a place computes beside the host: everything but 'cpu' and 'disk', which take what finds no room there. */
export function isAccelerator(name: string): boolean {
  return name !== 'cpu' && name !== DISK
}

/** Bytes of '10GiB', '500MB', ... or of a number. KiB, MiB, GiB, TiB are binary, KB, MB, GB, TB decimal; Kb ... Tb are bits. */
function parseMemory(size: number | string, where = 'maxMemory'): number {
  if (typeof size === 'number' && Number.isSafeInteger(size) && size >= 0) return size
  const match = typeof size === 'string' ? /^(\d+(?:\.\d+)?)\s*([KMGT])(i?)(B)$/i.exec(size.trim()) : null
  if (!match) {
    refuse(
      `${where}: ${JSON.stringify(size)} is not a size; give a number of bytes, or a text like '10GiB' or '500MB'`,
    )
  }
  const power = 'KMGT'.indexOf(match[2]!.toUpperCase()) + 1
  const bytes = Number(match[1]) * (match[3] ? 1024 : 1000) ** power
  return Math.floor(!match[3] && match[4] === 'b' ? bytes / 8 : bytes)
}

/** Where a place stands in the order in which places are filled. */
function rank(name: string): number {
  const [type, index] = name.split(':')
  if (name === DISK) return 1e9
  if (name === 'cpu') return 1e8
  return (type === 'cuda' ? 0 : 1e6) + Number(index)
}

/**
 * Bytes for each place, GPUs first, then further devices, 'cpu' and 'disk': what is given, with its units read; by
 * default what is free on every GPU, and nine tenths of what is free in main memory.
 */
export function getMaxMemory(given?: MaxMemory): Record<string, number> {
  if (given === undefined) {
    const all = devices().map((each): [string, number] => {
      const { free } = each.memoryUsage()
      return [each.name, each.name === 'cpu' ? Math.floor(free * 0.9) : free]
    })
    return Object.fromEntries(all.sort(([a], [b]) => rank(a) - rank(b)))
  }
  if (typeof given !== 'object' || given === null || Array.isArray(given)) {
    refuse(`maxMemory is ${JSON.stringify(given)}; it must be an object like { 0: '10GiB', cpu: '30GiB' }`)
  }
  const entries = new Map<string, number>()
  for (const [key, size] of Object.entries(given)) {
    const name = placeName(key, 'maxMemory')
    if (entries.has(name)) refuse(`maxMemory names ${name} twice`)
    entries.set(name, parseMemory(size, `maxMemory[${JSON.stringify(key)}]`))
  }
  return Object.fromEntries([...entries].sort(([a], [b]) => rank(a) - rank(b)))
}

/** ERR_HALFBYTE_DEVICE for the first place that is not there. */
export function checkPlaces(names: Iterable<string>): void {
  for (const name of names) if (name !== DISK) openDevice(name)
}
