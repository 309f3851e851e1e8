/** What a deviceMap option means for a model: a place for every module, checked before anything is loaded. */
import { HalfbyteError } from '../errors.js'
import { Linear4bit } from '../nn/linear4bit.js'
import { Linear8bit } from '../nn/linear8bit.js'
import type { Module } from '../nn/module.js'
import { Device } from '../tensor/device.js'
import {
  evenDeviceMap,
  getBalancedMemory,
  inferAutoDeviceMap,
  type DeviceMap,
  type MapOptions,
  type NoSplitModules,
} from './device_map.js'
import { checkPlaces, DISK, getMaxMemory, isAccelerator, placeName, type PlaceLike } from './max_memory.js'
import { moduleTree, walk } from './module_tree.js'
import { count, list } from './source.js'

const STRATEGIES = ['auto', 'balanced', 'balanced_low_0', 'sequential'] as const
export type MapStrategy = (typeof STRATEGIES)[number]

/**
 * Where the parts of a model go: a strategy, one place for all of it, or places by module path, as
 * { 'model.embed_tokens': 0, 'model.layers': 'cuda:1', 'model.norm': 'cpu', lm_head: 'disk' }. The longest path that a
 * module lies under counts; '' is the whole model.
 */
export type DeviceMapOption = MapStrategy | PlaceLike | Readonly<Record<string, PlaceLike>>

export interface PlacementOptions extends MapOptions {
  /** Quantised layers may lie on 'cpu' and 'disk' beside an accelerator. Default false. */
  offloadQuantized?: boolean | undefined
  /** Modules may lie on the disk. Default true. */
  disk?: boolean | undefined
}

function refuse(what: string): never {
  throw new HalfbyteError('ERR_HALFBYTE_VALUE', what)
}

function isQuantized(module: Module): boolean {
  return module instanceof Linear4bit || module instanceof Linear8bit
}

/** The place of a path: that of the longest entry above it. */
export function placeOf(map: Readonly<DeviceMap>, path: string): string | undefined {
  for (let at = path; ; at = at.slice(0, Math.max(0, at.lastIndexOf('.')))) {
    if (Object.hasOwn(map, at)) return map[at]
    if (at === '') return undefined
  }
}

/** The accelerator that takes the inputs and runs what lies on the disk; 'cpu' where a map names none. */
export function mainPlace(map: Readonly<DeviceMap>): string {
  return Object.values(map).find(isAccelerator) ?? 'cpu'
}

/** The map of a strategy. Of packed weights the statistics are not counted, so a tenth is kept free for them. */
export function mapByStrategy(
  model: Module & NoSplitModules,
  strategy: MapStrategy,
  options: MapOptions & { quantized?: boolean } = {},
): DeviceMap {
  const lowZero = strategy === 'balanced_low_0'
  const full =
    strategy === 'sequential'
      ? getMaxMemory(options.maxMemory)
      : getBalancedMemory(model, { ...options, lowZero })
  const keep = options.quantized ? 0.9 : 1
  const reduce = (memory: Record<string, number>) =>
    Object.fromEntries(Object.entries(memory).map(([name, bytes]) => [name, Math.floor(bytes * keep)]))
  const maxMemory = reduce(full)
  const map = inferAutoDeviceMap(model, { ...options, maxMemory })
  if (strategy === 'sequential' || lowZero) return map
  const used = new Set(Object.values(map))
  const idle = Object.keys(maxMemory).some(
    (name) => isAccelerator(name) && maxMemory[name]! > 0 && !used.has(name),
  )
  if (!idle || ![...used].every(isAccelerator)) return map
  return evenDeviceMap(model, reduce(getMaxMemory(options.maxMemory)), options) ?? map
}

function explicitMap(model: Module, given: Readonly<Record<string, unknown>>): DeviceMap {
  const nodes = [...walk(moduleTree(model))]
  const known = new Set(nodes.flatMap(({ path, own }) => [path, ...own.map((tensor) => tensor.path)]))
  const map: DeviceMap = {}
  for (const [path, place] of Object.entries(given)) {
    if (typeof place !== 'string' && typeof place !== 'number' && !(place instanceof Device)) {
      refuse(`deviceMap: ${JSON.stringify(path)} is on ${JSON.stringify(place)}, which is not a place`)
    }
    map[path] = placeName(place)
  }
  const strays = Object.keys(map).filter((path) => !known.has(path))
  if (strays.length > 0) {
    refuse(
      `deviceMap: the model has no ${list(strays)}; its modules begin with ` +
        list(nodes.slice(1).map(({ path }) => path)),
    )
  }
  for (const { path, own } of nodes) {
    const places = [...new Set(own.map((tensor) => placeOf(map, tensor.path)))]
    if (places.length > 1 && !places.includes(undefined)) {
      refuse(`deviceMap: the tensors of ${path} are on ${places.join(' and ')}; a module is on one place`)
    }
  }
  const lost = nodes.flatMap(({ own }) =>
    own.flatMap(({ path }) => (placeOf(map, path) === undefined ? [path] : [])),
  )
  if (lost.length > 0) {
    refuse(
      `deviceMap: ${count(lost, 'tensor')} of the model are on no place: ${list(lost)}; ` +
        "name their modules, or add '' for all that is left",
    )
  }
  return map
}

/** Quantised layers beside an accelerator but not on it have to be asked for, as in transformers. */
function checkOffload(model: Module, map: DeviceMap, accelerators: boolean): void {
  const names = [...model.namedModules()].flatMap(([path, module]) => {
    const place = placeOf(map, path)
    const offloaded = place === DISK || (place === 'cpu' && accelerators)
    return offloaded && isQuantized(module) ? [`${path} (${place})`] : []
  })
  if (names.length === 0) return
  throw new HalfbyteError(
    'ERR_HALFBYTE_CONFIG',
    `deviceMap: ${count(names, 'quantised module')} would not be on an accelerator: ${list(names, 4)}. ` +
      'Give the accelerators more room with maxMemory, or set llmInt8EnableFp32CpuOffload: true (it counts for 4 bits ' +
      'too): they then stay quantised, compute on the CPU, and are read when needed where they are on the disk',
  )
}

/**
 * The place of each part of a model that is built but not loaded, its layers replaced by quantised ones if they are to
 * be. ERR_HALFBYTE_VALUE for a map that leaves something out or names what is not there, ERR_HALFBYTE_DEVICE for a
 * device that is missing, ERR_HALFBYTE_OUT_OF_MEMORY where nothing has room, ERR_HALFBYTE_CONFIG for quantised layers
 * on the host that nobody allowed.
 */
export function resolveDeviceMap(
  model: Module & NoSplitModules,
  wanted: DeviceMapOption,
  options: PlacementOptions = {},
): DeviceMap {
  let map: DeviceMap
  let accelerators: boolean
  if (STRATEGIES.includes(wanted as MapStrategy)) {
    const quantized = model.modules().some(isQuantized)
    checkPlaces(Object.keys(getMaxMemory(options.maxMemory)))
    map = mapByStrategy(model, wanted as MapStrategy, { ...options, quantized })
    const memory = getMaxMemory(options.maxMemory)
    accelerators = Object.keys(memory).some((name) => isAccelerator(name) && memory[name]! > 0)
  } else {
    if (options.maxMemory !== undefined) {
      refuse(
        `maxMemory is for the strategies ${STRATEGIES.join(', ')}; this deviceMap says where everything goes`,
      )
    }
    if (typeof wanted === 'string' && !/^(disk|\d+|(cpu|cuda)(:\d+)?)$/.test(wanted)) {
      refuse(
        `deviceMap: ${JSON.stringify(wanted)} is neither a strategy (${STRATEGIES.join(', ')}) nor a place ` +
          "(N or 'cuda:N', 'cpu', 'cpu:N', 'disk')",
      )
    }
    const single = typeof wanted !== 'object' || wanted instanceof Device
    if (wanted === null || Array.isArray(wanted)) refuse(`deviceMap is ${JSON.stringify(wanted)}`)
    map = single ? { '': placeName(wanted) } : explicitMap(model, wanted)
    checkPlaces(Object.values(map))
    accelerators = Object.values(map).some(isAccelerator)
  }
  if (options.disk === false && Object.values(map).includes(DISK)) {
    refuse('deviceMap: a model that is in memory cannot have modules on the disk; load it with this map')
  }
  if (!(options.offloadQuantized ?? false)) checkOffload(model, map, accelerators)
  return map
}
