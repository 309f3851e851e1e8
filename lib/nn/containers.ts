/** Modules that hold others in order. */
import type { Tensor } from '../tensor/tensor.js'
import { Module } from './module.js'

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
    this.#items[Number(name)] = module as M
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
    this.#items[Number(name)] = module
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
