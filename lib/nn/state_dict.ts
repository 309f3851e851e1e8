/** State dicts: their entries, and checking and loading whole ones; see Module.loadStateDict(). */
import { HalfbyteError } from '../errors.js'
import type { DType } from '../tensor/dtype.js'
import type { Shape } from '../tensor/shape.js'
import type { Tensor } from '../tensor/tensor.js'
import type { Module } from './module.js'
import type { Parameter } from './parameter.js'
import { join, places } from './paths.js'
import { refreshCopies, tiedCopies } from './tied.js'

/** A tensor of a state dict that is not read yet. */
export interface StateEntry {
  readonly dtype: DType
  readonly shape: Shape
  /** Entries with one key are one tensor: tied. */
  readonly key: unknown
  /** A tensor of the caller's own; on the CPU where the weight lies on the disk. */
  readonly read: () => Tensor | Promise<Tensor>
}

/** The entry of a tensor that is in memory. */
export function entryOf(tensor: Tensor): StateEntry {
  const { dtype, shape, storageId, offset, size } = tensor
  const key = size > 0 ? `${storageId} ${offset} ${size} ${dtype}` : {}
  return { dtype, shape, key, read: () => tensor.detach() }
}

/** Of all modules of a model, by full name. */
export async function stateEntries(model: Module): Promise<Map<string, StateEntry>> {
  const entries = new Map<string, StateEntry>()
  for (const [prefix, module] of places(model)) {
    for (const [name, entry] of await module.ownEntries()) entries.set(join(prefix, name), entry)
  }
  return entries
}

/** Reads entries, tied ones once. */
export async function readEntries(entries: ReadonlyMap<string, StateEntry>): Promise<Map<string, Tensor>> {
  const state = new Map<string, Tensor>()
  const made = new Map<unknown, Tensor>()
  try {
    for (const [name, { key, read }] of entries) {
      const tensor = made.get(key)?.share() ?? (await read())
      made.set(key, tensor)
      state.set(name, tensor)
    }
    return state
  } catch (error) {
    for (const tensor of state.values()) tensor.dispose()
    throw error
  }
}

export interface LoadStateDictResult {
  missing: string[]
  unexpected: string[]
}

/** Names as the module knows them; `wrong` are complete sentences that begin with such a name. */
export interface OwnProblems {
  missing: string[]
  unexpected: string[]
  wrong: { name: string; problem: string }[]
}

/** The error of whoever would give what lies on the disk another value. */
export function onDiskError(what: string): HalfbyteError {
  return new HalfbyteError(
    'ERR_HALFBYTE_USAGE',
    `${what} lies on the disk and cannot take other weights; load the model again with a device map without 'disk'`,
  )
}

/** Compares a module's places with the tensors meant for it. */
export function ownProblems(
  places: ReadonlyMap<string, Parameter>,
  own: ReadonlyMap<string, Tensor>,
): OwnProblems {
  const problems: OwnProblems = { missing: [], unexpected: [], wrong: [] }
  for (const [name, place] of places) {
    const tensor = own.get(name)
    const problem = tensor && place.reject(tensor)
    if (!tensor) problems.missing.push(name)
    else if (problem) problems.wrong.push({ name, problem })
  }
  for (const name of own.keys()) if (!places.has(name)) problems.unexpected.push(name)
  return problems
}

/** The deepest place whose path leads to a name: its path, which is '' for the root. */
function placeOf(name: string, modules: ReadonlyMap<string, Module>): string {
  for (let end = name.length; end > 0; end = name.lastIndexOf('.', end - 1)) {
    const path = name.slice(0, end)
    if (end < name.length && modules.has(path)) return path
  }
  return ''
}

/** Whether some of a module lies on the disk; with names that are no parameters' of its own, of those below too. */
function liesOnDisk(module: Module, own: ReadonlyMap<string, Tensor>): boolean {
  const names = new Set([...module.ownParameters()].map(([name]) => name))
  const handsOn = [...own.keys()].some((name) => !names.has(name) && module.ownAccepts(name))
  return (handsOn ? module.modules() : [module]).some((each) =>
    [...each.ownParameters()].some(([, { isOffloaded }]) => isOffloaded),
  )
}

export async function loadStateDict(
  root: Module,
  state: ReadonlyMap<string, Tensor>,
  strict: boolean,
): Promise<LoadStateDictResult> {
  if (typeof (state as Partial<typeof state> | null | undefined)?.get !== 'function') {
    throw new HalfbyteError(
      'ERR_HALFBYTE_STATE_DICT',
      'loadStateDict: a Map of tensors by name is needed, as stateDict() gives it; ' +
        'new Map(Object.entries(tensors)) makes one of an object',
    )
  }
  root.namePaths()
  const modules = new Map(places(root))
  const parts = new Map([...modules.keys()].map((path) => [path, new Map<string, Tensor>()]))
  for (const [name, tensor] of state) {
    const path = placeOf(name, modules)
    parts.get(path)!.set(path === '' ? name : name.slice(path.length + 1), tensor)
  }

  // a copy is another name of what it is a copy of
  const originals = new Map<Parameter, Parameter>(tiedCopies(root).map(({ copy, of }) => [copy, of]))
  const renamed: { name: string; of: Parameter; tensor: Tensor }[] = []
  for (const [path, own] of parts) {
    for (const [name, parameter] of modules.get(path)!.ownParameters()) {
      const [of, tensor] = [originals.get(parameter), own.get(name)]
      if (!of || !tensor) continue
      own.delete(name)
      renamed.push({ name: join(path, name), of, tensor })
    }
  }
  const offloaded = [...parts].find(([path, own]) => own.size > 0 && liesOnDisk(modules.get(path)!, own))
  const onDisk = offloaded?.[0] ?? renamed.find(({ of }) => of.isOffloaded)?.name
  if (onDisk !== undefined) throw onDiskError(`loadStateDict: ${onDisk || root.constructor.name}`)

  const missing: string[] = []
  const unexpected: string[] = []
  const wrong: string[] = []
  const filled = new Set<object>()
  const absent: [string, object | undefined][] = []
  for (const [path, own] of parts) {
    const module = modules.get(path)!
    const problems = module.ownStateProblems(own)
    const parameters = new Map(module.ownParameters())
    for (const [name, parameter] of parameters) if (own.has(name)) filled.add(parameter.identity)
    for (const name of problems.missing) absent.push([join(path, name), parameters.get(name)?.identity])
    unexpected.push(...problems.unexpected.map((name) => join(path, name)))
    wrong.push(...problems.wrong.map(({ name, problem }) => `${join(path, name)} ${problem}`))
  }
  for (const { name, of, tensor } of renamed) {
    const problem = of.reject(tensor)
    if (problem) wrong.push(`${name} ${problem}`)
    filled.add(of.identity)
  }
  // a tied parameter is there when any of its names is
  for (const [name, identity] of absent) if (!identity || !filled.has(identity)) missing.push(name)

  const complaints = [
    ...(strict ? missing.map((name) => `${name} is missing`) : []),
    ...(strict ? unexpected.map((name) => `${name} is not in the model`) : []),
    ...wrong,
  ]
  if (complaints.length > 0) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_STATE_DICT',
      `loadStateDict: ${root.constructor.name} cannot take this state dict:\n  ${complaints.join('\n  ')}`,
    )
  }
  const refused = new Set(unexpected)
  for (const [path, own] of parts) {
    const module = modules.get(path)!
    for (const [name, tensor] of own) {
      if (!refused.has(join(path, name))) await module.ownLoad(name, tensor.detach())
    }
  }
  for (const { of, tensor } of renamed) of.load(tensor.detach())
  refreshCopies(root)
  return { missing, unexpected }
}
