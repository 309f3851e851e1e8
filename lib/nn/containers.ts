/** Modules that hold others in order. */
import type { Tensor } from '../tensor/tensor.js'
import { HalfbyteError } from '../errors.js'
import { refuseSpreadChildren } from './hooks.js'
import { Module } from './module.js'

function setItem<M extends Module>(list: Module, items: M[], name: string, module: M): void {
  refuseSpreadChildren(list, 'setChild')
  if (!Object.hasOwn(items, name)) {
    const what = `${list.constructor.name} of ${items.length} has no child '${name}'`
    throw new HalfbyteError('ERR_HALFBYTE_VALUE', `setChild: ${what}`)
  }
  items[Number(name)] = module
}

/** A list of modules: children named '0', '1', ... */
export class ModuleList<M extends Module = Module> extends Module implements Iterable<M> {
  readonly #items: M[]

  constructor(items: Iterable<M> = []) {
    super()
    this.#items = [...items]
  }

  override get dispatch(): 'pipeline' {
    return 'pipeline'
  }

  get length(): number {
    return this.#items.length
  }

  /** The module at an index; negative ones count from the end. */
  at(index: number): M | undefined {
    return this.#items.at(index)
  }

  push(...modules: M[]): number {
    refuseSpreadChildren(this, 'push')
    return this.#items.push(...modules)
  }

  [Symbol.iterator](): IterableIterator<M> {
    return this.#items[Symbol.iterator]()
  }

  override *namedChildren(): IterableIterator<[string, Module]> {
    for (const [i, module] of this.#items.entries()) yield [String(i), module]
  }

  override childOnPath(path: string): [string, Module] | undefined {
    const [name = ''] = path.split('.', 1)
    const child = this.#items[Number(name)]
    return child && String(Number(name)) === name ? [name, child] : undefined
  }

  override setChild(name: string, module: Module): void {
    setItem(this, this.#items, name, module as M)
  }

  /** A list computes nothing by itself: loop over it. */
  forward(): never {
    throw new TypeError('ModuleList has no forward(): iterate over its modules')
  }
}

/** Modules that each take the result of the one before. */
export class Sequential extends Module implements Iterable<Module> {
  readonly #items: Module[]

  constructor(...modules: Module[]) {
    super()
    this.#items = modules
  }

  override get dispatch(): 'pipeline' {
    return 'pipeline'
  }

  get length(): number {
    return this.#items.length
  }

  at(index: number): Module | undefined {
    return this.#items.at(index)
  }

  [Symbol.iterator](): IterableIterator<Module> {
    return this.#items[Symbol.iterator]()
  }

  override *namedChildren(): IterableIterator<[string, Module]> {
    for (const [i, module] of this.#items.entries()) yield [String(i), module]
  }

  override setChild(name: string, module: Module): void {
    setItem(this, this.#items, name, module)
  }

  /** Results in between are freed as soon as the next module has taken them. */
  forward(x: Tensor): Tensor {
    let at = x
    for (const module of this.#items) {
      const next = (module.forward as (x: Tensor) => Tensor).call(module, at)
      if (at !== x && at !== next) at.dispose()
      at = next
    }
    return at
  }
}
