/** Modules that hold others in order. */
import type { Tensor } from '../tensor/tensor.js'
import { HalfbyteError } from '../errors.js'
import { refuseSpreadChildren } from './hooks.js'
import { Module } from './module.js'

/** Children named '0', '1', ... */
abstract class Items<M extends Module> extends Module implements Iterable<M> {
  protected readonly _items: M[]

  constructor(items: M[]) {
    super()
    this._items = items
  }

  override get dispatch(): 'pipeline' {
    return 'pipeline'
  }

  get length(): number {
    return this._items.length
  }

  /** The module at an index; negative ones count from the end. */
  at(index: number): M | undefined {
    return this._items.at(index)
  }

  [Symbol.iterator](): IterableIterator<M> {
    return this._items[Symbol.iterator]()
  }

  override *namedChildren(): IterableIterator<[string, Module]> {
    for (const [i, module] of this._items.entries()) yield [String(i), module]
  }

  override childOnPath(path: string): [string, Module] | undefined {
    const [name = ''] = path.split('.', 1)
    const child = this._items[Number(name)]
    return child && String(Number(name)) === name ? [name, child] : undefined
  }

  override setChild(name: string, module: Module): void {
    refuseSpreadChildren(this, 'setChild')
    if (!Object.hasOwn(this._items, name)) {
      const what = `${this.constructor.name} of ${this.length} has no child '${name}'`
      throw new HalfbyteError('ERR_HALFBYTE_VALUE', `setChild: ${what}`)
    }
    this._items[Number(name)] = module as M
  }
}

/** A list of modules. */
export class ModuleList<M extends Module = Module> extends Items<M> {
  constructor(items: Iterable<M> = []) {
    super([...items])
  }

  push(...modules: M[]): number {
    refuseSpreadChildren(this, 'push')
    return this._items.push(...modules)
  }

  /** A list computes nothing by itself: loop over it. */
  forward(): never {
    throw new TypeError('ModuleList has no forward(): iterate over its modules')
  }
}

/** Modules that each take the result of the one before. */
export class Sequential extends Items<Module> {
  constructor(...modules: Module[]) {
    super(modules)
  }

  /** Results in between are freed as soon as the next module has taken them. */
  forward(x: Tensor): Tensor {
    let at = x
    for (const module of this) {
      const next = (module.forward as (x: Tensor) => Tensor).call(module, at)
      if (at !== x && at !== next) at.dispose()
      at = next
    }
    return at
  }
}
