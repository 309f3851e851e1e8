/**
 * Device maps by strategy: which part of a model goes where, given how much each place may hold. Places are filled one
 * after the other in the order of the modules; a module that does not fit is split into its children unless it is a leaf
 * or of a class that is not to be split; a place that was left is not returned to. The first accelerator and the host
 * keep room for the largest layer that is still to come, so that an offloaded one can be brought in. These are the rules
 * of accelerate and transformers, and give their maps; see evenDeviceMap() for where ours go further.
 */
import { HalfbyteError } from '../errors.js'
import type { Module } from '../nn/module.js'
import { DISK, getMaxMemory, isAccelerator, type MaxMemory } from './max_memory.js'
import { isWithin, moduleSizes, moduleTree, walk, type ModuleNode, type ModuleSizes } from './module_tree.js'

/** Module paths and the places they are on: 'cuda:0', 'cpu', 'disk'. A path stands for all that is below it. */
export type DeviceMap = Record<string, string>

export interface MapOptions {
  /** Bytes for each place; see getMaxMemory(). Default: what is free. */
  maxMemory?: MaxMemory | undefined
  /** Classes whose modules stay in one piece. Default: those that the model names in `noSplitModules`. */
  noSplitModuleClasses?: readonly string[] | undefined
}

export interface BalanceOptions extends MapOptions {
  /** The first accelerator takes only what the others cannot hold. Default false. */
  lowZero?: boolean | undefined
}

/** What a model may say about itself. */
export interface NoSplitModules {
  readonly noSplitModules?: readonly string[]
}

/** Something that is to be placed: a module, or one tensor of a module that was split. */
interface Item {
  path: string
  /** Undefined for a tensor. */
  node?: ModuleNode
}

const size = (sizes: ModuleSizes, path: string) => sizes.bytes.get(path) ?? 0

function classesOf(model: Module & NoSplitModules, options: MapOptions): ReadonlySet<string> {
  return new Set(options.noSplitModuleClasses ?? model.noSplitModules ?? [])
}

/** Tensors of a module's own before its children: what it is split into. Buffers of the root come last. */
function partsOf(node: ModuleNode): Item[] {
  const tensors = (kind: 'parameter' | 'buffer') =>
    node.own.filter((own) => own.kind === kind).map(({ path }): Item => ({ path }))
  const children = node.children.map((child): Item => ({ path: child.path, node: child }))
  return [...tensors('parameter'), ...children, ...tensors('buffer')]
}

function isWhole(item: Item, classes: ReadonlySet<string>): boolean {
  return !item.node || item.node.children.length === 0 || classes.has(item.node.className)
}

/** The pieces that are never split, in the order of the modules. */
function* pieces(items: readonly Item[], classes: ReadonlySet<string>): Generator<Item> {
  for (const item of items) {
    if (isWhole(item, classes)) yield item
    else yield* pieces(partsOf(item.node!), classes)
  }
}

/**
 * The share of each accelerator when a model is spread evenly: the average and some room, so that rounding to whole
 * layers does not push the last ones out; the last accelerator keeps all that it may hold.
 */
export function getBalancedMemory(
  model: Module & NoSplitModules,
  options: BalanceOptions = {},
): Record<string, number> {
  const memory = getMaxMemory(options.maxMemory)
  const used = Object.keys(memory).filter((name) => isAccelerator(name) && memory[name]! > 0)
  if (used.length === 0) return memory
  if (used.length === 1) {
    // what is free now has to hold activations too
    if (options.maxMemory === undefined) memory[used[0]!] = Math.floor(memory[used[0]!]! * 0.9)
    return memory
  }
  const root = moduleTree(model)
  const sizes = moduleSizes(root)
  const classes = classesOf(model, options)
  const total = size(sizes, '')
  const largest = (nodes: Iterable<ModuleNode>) => {
    let most = 0
    for (const node of nodes) most = Math.max(most, size(sizes, node.path))
    return most
  }
  const all = [...walk(root)]
  const block = largest(all.filter((node) => node.path !== '' && classes.has(node.className)))
  const leaf = largest(all.filter((node) => node.children.length === 0))
  const lowZero = options.lowZero ?? false
  const share =
    Math.floor(total / (lowZero ? used.length - 1 : used.length)) + Math.floor(1.25 * Math.max(block, leaf))
  const [first, ...others] = used as [string, ...string[]]
  for (const name of used.slice(0, -1)) {
    if (!lowZero || name !== first) memory[name] = Math.min(share, memory[name]!)
  }
  if (lowZero) {
    const elsewhere = others.reduce((sum, name) => sum + memory[name]!, 0)
    memory[first] = Math.min(Math.max(0, total - elsewhere), memory[first]!)
  }
  return memory
}

/** Fills the places of `memory` one after the other. */
class Filling {
  readonly map: DeviceMap = {}
  readonly #sizes: ModuleSizes
  readonly #classes: ReadonlySet<string>
  readonly #memory: Readonly<Record<string, number>>
  readonly #places: string[]
  readonly #main: ReadonlySet<string>
  #todo: Item[]
  #at = 0
  #used = 0
  /** The largest of the pieces that are still to come, and which ones are as large. */
  #largest = 0
  #largestPaths: string[] = []

  constructor(root: ModuleNode, memory: Readonly<Record<string, number>>, classes: ReadonlySet<string>) {
    this.#sizes = moduleSizes(root)
    this.#classes = classes
    this.#memory = memory
    this.#places = Object.keys(memory)
    if (!this.#places.includes(DISK)) this.#places.push(DISK)
    const first = this.#places.find(isAccelerator)
    this.#main = new Set([...(first === undefined ? [] : [first]), 'cpu'])
    this.#todo = partsOf(root)
    this.#measure()
  }

  run(): DeviceMap {
    for (let item; (item = this.#todo.shift());) {
      const { path } = item
      this.#largestPaths = this.#largestPaths.filter((other) => !isWithin(other, path))
      if (this.#largestPaths.length === 0) this.#measure()
      const partners = this.#partners(path)
      if (!this.#fits(size(this.#sizes, path))) this.#splitOrMoveOn(item)
      else if (partners.length === 0) this.#put([path], size(this.#sizes, path))
      else this.#placeTied(item, partners)
    }
    return this.map
  }

  #measure(): void {
    this.#largest = 0
    this.#largestPaths = []
    for (const { path, node } of pieces(
      this.#todo.filter((item) => item.node),
      this.#classes,
    )) {
      if (!node) continue
      const bytes = size(this.#sizes, path)
      if (bytes > this.#largest) this.#largestPaths = []
      if (bytes >= this.#largest) this.#largestPaths.push(path)
      this.#largest = Math.max(this.#largest, bytes)
    }
  }

  #fits(bytes: number): boolean {
    const place = this.#places[this.#at]!
    const limit = this.#memory[place] ?? (place === DISK ? Infinity : 0)
    return this.#used + bytes <= limit - (this.#main.has(place) ? this.#largest : 0)
  }

  #put(paths: readonly string[], bytes: number): void {
    this.#used += bytes
    for (const path of paths) this.map[path] = this.#places[this.#at]!
  }

  #moveOn(item: Item): void {
    this.#at++
    this.#used = 0
    if (this.#at === this.#places.length) {
      const limits = this.#places.map((place) => `${place} ${this.#memory[place] ?? 'unlimited'}`).join(', ')
      throw new HalfbyteError(
        'ERR_HALFBYTE_OUT_OF_MEMORY',
        `deviceMap: no place is left for ${item.path} (${size(this.#sizes, item.path)} bytes) of a model of ` +
          `${size(this.#sizes, '')} bytes; the limits are ${limits}. Raise maxMemory, or quantise the model`,
      )
    }
    this.#todo.unshift(item)
  }

  #splitOrMoveOn(item: Item): void {
    if (isWhole(item, this.#classes)) return this.#moveOn(item)
    this.#todo.unshift(...partsOf(item.node!))
    this.#measure()
  }

  /** Items still to be placed that hold a tensor which is tied to one within `path`. */
  #partners(path: string): Item[] {
    const outside = this.#sizes.ties
      .filter((group) => group.some((tensor) => isWithin(tensor, path)))
      .flatMap((group) => group.filter((tensor) => !isWithin(tensor, path)))
    return this.#todo.filter((item) => outside.some((tensor) => isWithin(tensor, item.path)))
  }

  /** Tied tensors are one tensor: what holds them goes to one place. */
  #placeTied(item: Item, partners: Item[]): void {
    const bytes = [item, ...partners].reduce((sum, { path }) => sum + size(this.#sizes, path), 0)
    if (this.#fits(bytes)) {
      this.#put(
        [item, ...partners].map(({ path }) => path),
        bytes,
      )
      this.#todo = this.#todo.filter((other) => !partners.includes(other))
      return
    }
    const divisible = partners.find((partner) => !isWhole(partner, this.#classes))
    if (!divisible) return this.#moveOn(item)
    this.#todo.splice(this.#todo.indexOf(divisible), 1, ...partsOf(divisible.node!))
    this.#todo.unshift(item)
    this.#measure()
  }
}

/** Joins neighbours: where all that is below a path is on one place, the path stands for it. */
export function cleanDeviceMap(map: Readonly<DeviceMap>): DeviceMap {
  const clean = new Map(Object.entries(map))
  const visit = (prefix: string) => {
    const below = [...clean.keys()].filter((path) => isWithin(path, prefix))
    const places = new Set(below.map((path) => clean.get(path)!))
    if (below.length > 1 && places.size === 1) {
      for (const path of below) clean.delete(path)
      clean.set(prefix, [...places][0]!)
      return
    }
    const depth = prefix === '' ? 1 : prefix.split('.').length + 1
    const next = new Set(
      below.filter((path) => path !== prefix).map((path) => path.split('.').slice(0, depth).join('.')),
    )
    for (const child of next) visit(child)
  }
  visit('')
  return Object.fromEntries(clean)
}

/**
 * Where each part of a model goes. A model without memory will do; one that was prepared by replaceWithQuantizedLinear()
 * is counted as packed. What finds no room in `maxMemory` is left on the disk, unless `disk` has a limit there.
 */
export function inferAutoDeviceMap(model: Module & NoSplitModules, options: MapOptions = {}): DeviceMap {
  const memory = getMaxMemory(options.maxMemory)
  return cleanDeviceMap(new Filling(moduleTree(model), memory, classesOf(model, options)).run())
}

/**
 * The division of a model among accelerators whose fullest part is smallest, in the order of the modules; undefined when
 * there are fewer pieces than accelerators, or one of them cannot hold its part. Tied modules go with the first of them.
 */
export function evenDeviceMap(
  model: Module & NoSplitModules,
  memory: Readonly<Record<string, number>>,
  options: MapOptions = {},
): DeviceMap | undefined {
  const places = Object.keys(memory).filter((name) => isAccelerator(name) && memory[name]! > 0)
  const root = moduleTree(model)
  const sizes = moduleSizes(root)
  const units: { paths: string[]; bytes: number }[] = []
  for (const { path } of pieces(partsOf(root), classesOf(model, options))) {
    const tied = sizes.ties.filter((group) => group.some((tensor) => isWithin(tensor, path))).flat()
    const home = units.find(({ paths }) => paths.some((p) => tied.some((tensor) => isWithin(tensor, p))))
    const bytes = size(sizes, path)
    if (home) {
      home.paths.push(path)
      home.bytes += bytes
    } else if (bytes * 1000 < size(sizes, '') && units.length > 0) {
      // norms and the like go with what is before them: they make no part of their own
      units.at(-1)!.paths.push(path)
      units.at(-1)!.bytes += bytes
    } else units.push({ paths: [path], bytes })
  }
  if (units.length < places.length) return undefined
  const parts = divide(
    units.map(({ bytes }) => bytes),
    places.length,
  )
  const map: DeviceMap = {}
  let at = 0
  for (const [i, count] of parts.entries()) {
    const part = units.slice(at, (at += count))
    if (part.reduce((sum, { bytes }) => sum + bytes, 0) > memory[places[i]!]!) return undefined
    for (const { paths } of part) for (const path of paths) map[path] = places[i]!
  }
  return cleanDeviceMap(map)
}

/** Cuts a row of numbers into `n` runs, none empty, so that the largest sum is smallest. Lengths of the runs. */
function divide(numbers: readonly number[], n: number): number[] {
  const cut = (limit: number): number[] | undefined => {
    const lengths: number[] = []
    let [length, sum] = [0, 0]
    for (const [i, number] of numbers.entries()) {
      const rest = numbers.length - i
      // as many runs must be left as are still to be begun
      const forced = rest === n - lengths.length - 1 && length > 0
      if (length > 0 && (sum + number > limit || forced)) {
        lengths.push(length)
        length = sum = 0
      }
      length++
      sum += number
      if (sum > limit || lengths.length >= n) return undefined
    }
    lengths.push(length)
    return lengths.length === n ? lengths : undefined
  }
  let low = Math.max(...numbers)
  let high = numbers.reduce((a, b) => a + b, 0)
  while (high - low >= 1) {
    const middle = Math.floor((low + high) / 2)
    if (cut(middle)) high = middle
    else low = middle + 1
  }
  return cut(high)!
}
