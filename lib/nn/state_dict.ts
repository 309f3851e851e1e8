/** Checks and loading of whole state dicts; see Module.loadStateDict. */
import { HalfbyteError } from '../errors.js'
import type { Tensor } from '../tensor/tensor.js'
import type { Module } from './module.js'
import type { Parameter } from './parameter.js'

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
function placeOf(name: string, places: ReadonlyMap<string, Module>): string {
  for (let end = name.length; end > 0; end = name.lastIndexOf('.', end - 1)) {
    const path = name.slice(0, end)
    if (end < name.length && places.has(path)) return path
  }
  return ''
}

export async function loadStateDict(
  root: Module,
  everyPlace: Iterable<[string, Module]>,
  state: ReadonlyMap<string, Tensor>,
  strict: boolean,
): Promise<LoadStateDictResult> {
  root.namePaths()
  const places = new Map(everyPlace)
  const parts = new Map([...places.keys()].map((path) => [path, new Map<string, Tensor>()]))
  for (const [name, tensor] of state) {
    const path = placeOf(name, places)
    parts.get(path)!.set(path === '' ? name : name.slice(path.length + 1), tensor)
  }

  for (const [path, own] of parts) {
    const onDisk = [...places.get(path)!.ownParameters()].some(([, { isOffloaded }]) => isOffloaded)
    if (own.size === 0 || !onDisk) continue
    throw new HalfbyteError(
      'ERR_HALFBYTE_USAGE',
      `loadStateDict: ${path || root.constructor.name} lies on the disk and cannot take other weights; ` +
        "load the model again with a device map without 'disk'",
    )
  }

  const missing: string[] = []
  const unexpected: string[] = []
  const wrong: string[] = []
  const filled = new Set<object>()
  const absent: [string, object | undefined][] = []
  const full = (path: string, name: string) => (path === '' ? name : `${path}.${name}`)
  for (const [path, own] of parts) {
    const module = places.get(path)!
    const problems = module.ownStateProblems(own)
    const parameters = new Map(module.ownParameters())
    for (const [name, parameter] of parameters) if (own.has(name)) filled.add(parameter.identity)
    for (const name of problems.missing) absent.push([full(path, name), parameters.get(name)?.identity])
    unexpected.push(...problems.unexpected.map((name) => full(path, name)))
    wrong.push(...problems.wrong.map(({ name, problem }) => `${full(path, name)} ${problem}`))
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
    const module = places.get(path)!
    for (const [name, tensor] of own) {
      if (!refused.has(full(path, name))) await module.ownLoad(name, tensor.share())
    }
  }
  return { missing, unexpected }
}
