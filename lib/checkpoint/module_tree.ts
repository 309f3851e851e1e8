/** A model as the planner of device maps sees it: names, classes and bytes. */
import type { Module } from '../nn/module.js'

export interface ModuleNode {
  path: string
  className: string
  children: ModuleNode[]
  /** Own parameters and buffers, without those of children. `identity` is what tied ones share. */
  own: { path: string; kind: 'parameter' | 'buffer'; bytes: number; identity: object }[]
}

function join(prefix: string, name: string): string {
  return prefix === '' ? name : `${prefix}.${name}`
}

/** The tree below a module. A list of modules in a property is a node of its own, as in Python. */
export function moduleTree(module: Module, path = ''): ModuleNode {
  if (path === '') module.namePaths() // refuses a tree that is none
  const children = new Map<string, ModuleNode>()
  for (const [name, child] of module.namedChildren()) {
    const [first, ...rest] = name.split('.')
    const at = join(path, name)
    if (rest.length === 0) {
      children.set(name, moduleTree(child, at))
      continue
    }
    const list = children.get(first!) ?? {
      path: join(path, first!),
      className: 'ModuleList',
      children: [],
      own: [],
    }
    list.children.push(moduleTree(child, at))
    children.set(first!, list)
  }
  const own = [...module.ownParameters()].map(([name, parameter]) => ({
    path: join(path, name),
    kind: parameter.kind,
    bytes: parameter.nbytes,
    identity: parameter.identity,
  }))
  return { path, className: module.constructor.name, children: [...children.values()], own }
}

export function* walk(node: ModuleNode): Generator<ModuleNode> {
  yield node
  for (const child of node.children) yield* walk(child)
}

/** Whether `path` is `prefix` or lies below it; '' is above everything. */
export function isWithin(path: string, prefix: string): boolean {
  return prefix === '' || path === prefix || path.startsWith(`${prefix}.`)
}

export interface ModuleSizes {
  /** Bytes of parameters and buffers at or below each path, of a module or of a tensor. Tied ones count once. */
  bytes: ReadonlyMap<string, number>
  /** Paths that hold one and the same tensor. */
  ties: string[][]
}

/** Bytes at and below every path. Statistics of packed weights are not counted, as in transformers. */
export function moduleSizes(root: ModuleNode): ModuleSizes {
  const bytes = new Map<string, number>()
  const places = new Map<object, string[]>()
  for (const node of walk(root)) {
    for (const { path, bytes: size, identity } of node.own) {
      const first = places.get(identity)
      if (first) {
        first.push(path)
        continue
      }
      places.set(identity, [path])
      for (let at = path; ; at = at.slice(0, Math.max(0, at.lastIndexOf('.')))) {
        bytes.set(at, (bytes.get(at) ?? 0) + size)
        if (at === '') break
      }
    }
  }
  return { bytes, ties: [...places.values()].filter((paths) => paths.length > 1) }
}
