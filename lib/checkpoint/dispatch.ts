/** Spreads a model over devices as a device map says. */
import { HalfbyteError } from '../errors.js'
import { hook, isSpread, markSpread, setExecutionDevice, stream } from '../nn/hooks.js'
import { Conv1D, Linear } from '../nn/linear.js'
import { Linear4bit } from '../nn/linear4bit.js'
import { Linear8bit } from '../nn/linear8bit.js'
import type { Module } from '../nn/module.js'
import { relocate } from '../nn/moving.js'
import { Buffer, Parameter } from '../nn/parameter.js'
import { refreshCopies, setTiedCopies, type TiedCopy } from '../nn/tied.js'
import { device as openDevice, type Device } from '../tensor/device.js'
import type { DeviceMap, NoSplitModules } from './device_map.js'
import { DISK, isAccelerator } from './max_memory.js'
import {
  mainPlace,
  placeOf,
  resolveDeviceMap,
  type DeviceMapOption,
  type PlacementOptions,
} from './placement.js'

function join(prefix: string, name: string): string {
  return prefix === '' ? name : `${prefix}.${name}`
}

/** Where every module of a model is to run. What lies on the disk runs on the main device. */
export class Layout {
  readonly map: Readonly<DeviceMap>
  readonly main: Device
  readonly #places = new Map<Module, string | undefined>()

  constructor(model: Module, map: Readonly<DeviceMap>) {
    this.map = map
    this.main = openDevice(mainPlace(map))
    for (const [path, module] of model.namedModules()) {
      const [own] = module.ownParameters()
      this.#places.set(module, placeOf(map, own ? join(path, own[0]) : path))
    }
  }

  /** 'cuda:0', 'cpu', 'disk', ...; undefined for a module that is only made of others. */
  place(module: Module): string | undefined {
    return this.#places.get(module)
  }

  device(module: Module): Device | undefined {
    const place = this.place(module)
    return place === undefined ? undefined : place === DISK ? this.main : openDevice(place)
  }

  /** The device of what a path in the model leads to. */
  deviceAt(path: string): Device {
    const place = placeOf(this.map, path) ?? DISK
    return place === DISK ? this.main : openDevice(place)
  }

  /** Whether there is more to it than one device. */
  get isSpread(): boolean {
    return new Set(Object.values(this.map)).size > 1 || Object.values(this.map).includes(DISK)
  }
}

/** Gives tied parameters that are needed on several devices a place for a copy on each of the others. */
function separateTies(model: Module, layout: Layout): TiedCopy[] {
  const owners = new Map<object, { device: Device; parameter: Parameter }>()
  const copies: (TiedCopy & { device: Device })[] = []
  for (const module of model.modules()) {
    for (const [key, value] of Object.entries(module) as [string, unknown][]) {
      if (!(value instanceof Parameter)) continue
      const device = layout.device(module)!
      const owner = owners.get(value.identity)
      if (!owner) owners.set(value.identity, { device, parameter: value })
      if (!owner || owner.device === device) continue
      let made = copies.find((other) => other.of === owner.parameter && other.device === device)
      if (!made) {
        const copy = new Buffer(value.shape, { dtype: value.dtype, device: 'meta', persistent: false })
        copy.retarget({ device })
        copies.push((made = { copy, of: owner.parameter, device }))
      }
      ;(module as unknown as Record<string, unknown>)[key] = made.copy
    }
  }
  return copies
}

/** Moves every module to its device, or, while it is not loaded, says where it will go. */
export function placeModules(model: Module, layout: Layout): TiedCopy[] {
  const copies = separateTies(model, layout)
  const targets = new Map<Parameter, Device>()
  for (const module of model.modules()) {
    const device = layout.device(module)
    if (!device) continue
    for (const [, parameter] of module.ownParameters()) {
      if (!targets.has(parameter)) targets.set(parameter, device)
    }
  }
  relocate(targets.keys(), (parameter) => ({ device: targets.get(parameter)! }))
  for (const module of model.modules()) {
    const device = layout.device(module)
    if (device) module.ownMove(device)
  }
  return copies
}

/** Fills the copies from what was loaded, now and whenever that changes. */
export function fillCopies(model: Module, copies: readonly TiedCopy[]): void {
  setTiedCopies(model, copies)
  refreshCopies(model)
}

/** Whether a layer is one that copyTo() knows, without a forward() of its own. */
function canBeCopied(module: Module): module is Linear {
  const own = Object.getPrototypeOf(module) as Module
  return [Linear, Conv1D, Linear4bit, Linear8bit].some((kind) => kind.prototype.forward === own.forward)
}

/** Lets every module run on its device, with activations moved in between. */
export function hookModules(
  model: Module,
  layout: Layout,
  weightsOf: (module: Module) => ((forward: () => unknown) => unknown) | undefined = () => undefined,
): void {
  if (!layout.isSpread) return
  const seen = new Set<Module>()
  const firstDevice = (module: Module): Device | undefined => {
    for (const each of module.modules()) {
      const device = layout.device(each)
      if (device) return device
    }
    return undefined
  }
  // `around`: the device that the caller computes on; undefined in a pipeline, and at the top
  const visit = (module: Module, around: Device | undefined): void => {
    if (seen.has(module)) return
    seen.add(module)
    const home = layout.device(module) ?? firstDevice(module)
    if (module.dispatch === 'anywhere' || !home) return
    setExecutionDevice(module, home)
    const withWeights = weightsOf(module)
    const passes = module.dispatch === 'pipeline'
    const apart = module.modules().some((each) => (layout.device(each) ?? home) !== around)
    const streams = isAccelerator(layout.main.name) && canBeCopied(module)
    const isPart = around === undefined ? !passes : home !== around || (passes && apart)
    if (isPart || withWeights) hook(module, { device: home, bringBack: around !== undefined, withWeights })
    if (streams && layout.place(module) === 'cpu') stream(module, layout.main)
    for (const child of module.children()) visit(child, passes ? undefined : home)
  }
  visit(model, undefined)
  markSpread(model)
}

/**
 * Moves the parts of a loaded model to the devices that `deviceMap` names, and makes them run there: what a module gets
 * is moved to its device on the way in. Returns the map with its strategies worked out, also as hfDeviceMap. 'disk' is for models that are
 * loaded with a map; see AutoModelForCausalLM.fromPretrained().
 */
export function dispatchModel(
  model: Module & NoSplitModules & { hfDeviceMap?: DeviceMap | undefined },
  deviceMap: DeviceMapOption,
  options: PlacementOptions = {},
): DeviceMap {
  if (isSpread(model)) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_USAGE',
      'dispatchModel: a device map has spread this model already; load it again to spread it otherwise',
    )
  }
  const map = resolveDeviceMap(model, deviceMap, { offloadQuantized: true, ...options, disk: false })
  const layout = new Layout(model, map)
  fillCopies(model, placeModules(model, layout))
  hookModules(model, layout)
  model.hfDeviceMap = map
  return map
}
