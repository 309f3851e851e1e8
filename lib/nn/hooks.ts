/**
 * Modules on different devices. A hooked module runs on a device of its own whatever its inputs lie on: they are moved
 * there on the copy queues, in the order of the work that made them, and nobody waits. What the module returns stays
 * there, or is brought back to where the input came from.
 */
import { HalfbyteError } from '../errors.js'
import type { Device } from '../tensor/device.js'
import { Tensor } from '../tensor/tensor.js'
import type { Linear } from './linear.js'
import type { Module } from './module.js'

/** An argument that has a form for each device. */
export interface Movable {
  on(device: Device): unknown
}

export interface Hook {
  device: Device
  /** Results go back to the device of the first tensor among the inputs. */
  bringBack: boolean
  /** Brings in weights that are not in memory, runs `forward`, and lets them go. */
  withWeights?: ((forward: () => unknown) => unknown) | undefined
}

const homes = new WeakMap<Module, Device>()
const spread = new WeakSet<Module>()

/** The device that a module's computation is on, where a device map has spread its model. */
export function executionDevice(module: Module): Device | undefined {
  return homes.get(module)
}

export function setExecutionDevice(module: Module, device: Device): void {
  homes.set(module, device)
}

/** Whether a device map has put parts of a model on different devices. */
export function isSpread(model: Module): boolean {
  return spread.has(model)
}

export function markSpread(model: Module): void {
  for (const module of model.modules()) spread.add(module)
}

/** ERR_HALFBYTE_USAGE for a model whose modules run where a device map has put them: others in their place would not. */
export function refuseSpread(model: Module, what: string, remedy: string): void {
  if (typeof (model as Partial<Module> | null | undefined)?.modules !== 'function')
    throw new HalfbyteError('ERR_HALFBYTE_VALUE', `${what}: the model must be a Module, not ${String(model)}`)
  if (!model.modules().some((module) => spread.has(module))) return
  throw new HalfbyteError('ERR_HALFBYTE_USAGE', `${what}: a device map has spread this model; ${remedy}`)
}

/** refuseSpread() for putting a module among the children of one. */
export function refuseSpreadChildren(parent: Module, what: string): void {
  if (!spread.has(parent)) return
  refuseSpread(parent, what, 'load it again without one, replace the module, and then dispatchModel()')
}

function isPlain(value: object): boolean {
  return Array.isArray(value) || Object.getPrototypeOf(value) === Object.prototype
}

/** `value` with the tensors in it on `device`; `made` gets those that had to be copied. */
function carry(value: unknown, device: Device, made: Tensor[]): unknown {
  if (typeof value !== 'object' || value === null) return value
  if (value instanceof Tensor) {
    const moved = value.to(device)
    if (moved !== value) made.push(moved)
    return moved
  }
  if ('on' in value && typeof value.on === 'function') return (value as Movable).on(device)
  if (!isPlain(value)) return value
  if (Array.isArray(value)) {
    return value.some((item) => typeof item === 'object')
      ? value.map((item) => carry(item, device, made))
      : value
  }
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, carry(item, device, made)]))
}

function* tensorsIn(value: unknown): Generator<Tensor> {
  if (value instanceof Tensor) yield value
  else if (typeof value === 'object' && value !== null && isPlain(value)) {
    for (const item of Object.values(value)) yield* tensorsIn(item)
  }
}

function firstTensor(values: readonly unknown[]): Tensor | undefined {
  for (const tensor of tensorsIn(values)) return tensor
  return undefined
}

/** Tensors of a result that are neither the caller's nor the module's own. */
function passing(module: Module, inputs: readonly unknown[], result: unknown): Tensor[] {
  const kept = new Set<unknown>(tensorsIn(inputs))
  for (const each of module.modules()) {
    for (const [, { tensor }] of each.ownParameters()) kept.add(tensor)
    for (const [, tensor] of each.ownStatistics()) kept.add(tensor)
  }
  return [...tensorsIn(result)].filter((tensor) => !kept.has(tensor))
}

const hooked = new WeakMap<Module, Hook & { forward: unknown }>()

/**
 * Whether forward() is that of the module's class for inputs on a device: it has no other, or a hook that has nothing to
 * move there, and no weights to bring in.
 */
export function runsInPlace(module: Module, device: Device): boolean {
  if (!Object.hasOwn(module, 'forward')) return true
  const own = hooked.get(module)
  return own?.forward === module.forward && own.device === device && !own.withWeights
}

/** Puts the hook between a module and its callers. */
export function hook(module: Module, how: Hook): void {
  const { device, bringBack, withWeights } = how
  // eslint-disable-next-line @typescript-eslint/unbound-method -- called with the module
  const forward = module.forward as (...inputs: unknown[]) => unknown
  const around = (...inputs: unknown[]): unknown => {
    const made: Tensor[] = []
    const origin = bringBack ? firstTensor(inputs)?.device : undefined
    try {
      const here = inputs.map((input) => carry(input, device, made))
      const run = () => forward.apply(module, here)
      const result = withWeights ? withWeights(run) : run()
      // an input may be the result, or part of it
      const back = origin ? carry(result, origin, []) : result
      const returned = new Set(tensorsIn(back))
      if (back !== result) made.push(...passing(module, inputs, result))
      for (let i = made.length - 1; i >= 0; i--) if (returned.has(made[i]!)) made.splice(i, 1)
      return back
    } finally {
      for (const tensor of made) tensor.dispose()
    }
  }
  Object.defineProperty(module, 'forward', { value: around, configurable: true, writable: true })
  hooked.set(module, { ...how, forward: around })
}

/** Rows, and multiplications, from which a layer's weight is copied to an accelerator for one product. */
const STREAM_ROWS = 32
const STREAM_WORK = 2 ** 26

const streams = new WeakMap<Linear, Device>()

/** Whether a product of so many rows with a layer of the CPU is faster where its weight has to be copied to first. */
function isWorthCopying({ inFeatures, outFeatures }: Linear, rows: number): boolean {
  return rows >= STREAM_ROWS && rows * inFeatures * outFeatures >= STREAM_WORK
}

/** Whether a layer that may multiply elsewhere does so where its weight is, and x too; `rows` of it. */
export function streamsInPlace(layer: Linear, x: Tensor, rows = x.size / layer.inFeatures): boolean {
  return streams.has(layer) && layer.weight.device === x.device && !isWorthCopying(layer, rows)
}

/**
 * Lets a layer on the CPU multiply many rows on an accelerator. Few rows take as long as the weight takes to be read:
 * that is soonest done where it lies. Many take as long as the CPU computes, and then copying the weight, packed, costs
 * less; the copy is gone when the product is made.
 */
export function stream(layer: Linear, device: Device): void {
  // eslint-disable-next-line @typescript-eslint/unbound-method -- called with the layer
  const { forward } = layer
  streams.set(layer, device)
  const streamed = (x: Tensor, residual?: Tensor): Tensor =>
    isWorthCopying(layer, x.size / layer.inFeatures)
      ? layer.forwardOn(device, x, residual)
      : forward.call(layer, x, residual)
  Object.defineProperty(layer, 'forward', { value: streamed, configurable: true, writable: true })
}
