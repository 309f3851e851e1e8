/** Dotted paths in a tree of modules. */
import { HalfbyteError } from '../errors.js'
import type { Module } from './module.js'
import type { Parameter } from './parameter.js'

/** The path of what a module at `prefix` calls `name`. */
export function join(prefix: string, name: string): string {
  return prefix === '' ? name : name === '' ? prefix : `${prefix}.${name}`
}

/** Every place of every module, parents first: one that is in two places comes twice. */
export function* places(
  root: Module,
  prefix = '',
  above: readonly Module[] = [],
): IterableIterator<[string, Module]> {
  if (above.includes(root)) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_USAGE',
      `${prefix} is the ${root.constructor.name} that it is a part of; a property that begins with _ is no child`,
    )
  }
  yield [prefix, root]
  const path = [...above, root]
  for (const [name, child] of root.namedChildren()) yield* places(child, join(prefix, name), path)
}

/** Parameters or buffers by full name; with `once`, tied ones by their first. */
export function* namedPlaces(
  root: Module,
  kind: Parameter['kind'],
  once: boolean,
): IterableIterator<[string, Parameter]> {
  const seen = new Set<object>()
  for (const [prefix, module] of once ? root.namedModules() : places(root)) {
    for (const [name, parameter] of module.ownParameters()) {
      if (parameter.kind !== kind || (once && seen.has(parameter.identity))) continue
      seen.add(parameter.identity)
      yield [join(prefix, name), parameter]
    }
  }
}

/** Tells every parameter its full name. */
export function namePaths(root: Module): void {
  for (const [prefix, module] of places(root)) {
    for (const [name, parameter] of module.ownParameters()) {
      const path = join(prefix, name)
      if (path.endsWith(parameter.path)) parameter.path = path
    }
  }
}

export interface Resolved {
  /** The deepest module on the way of a path. */
  module: Module
  /** What is left of the path. */
  rest: string
  /** Whose child the module is, as `name`. */
  parent?: Module
  name: string
}

export function resolve(root: Module, path: string): Resolved {
  let at: Resolved = { module: root, rest: path, name: '' }
  for (;;) {
    const { module, rest } = at
    const found = module.childOnPath(rest)
    if (!found) return at
    const [name, child] = found
    at = { module: child, rest: rest.slice(name.length + 1), parent: module, name }
  }
}
