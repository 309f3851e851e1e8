/** Loading a model tensor by tensor; see Module.loadParameter(). */
import { HalfbyteError } from '../errors.js'
import type { Tensor } from '../tensor/tensor.js'
import type { Module } from './module.js'
import { join, places, resolve } from './paths.js'
import { originalOf, refreshCopies, tiedCopies } from './tied.js'

export function acceptsParameter(model: Module, path: string): boolean {
  const { module, rest } = resolve(model, path)
  return module.ownAccepts(rest) || originalOf(module, rest) !== undefined
}

export async function loadParameter(model: Module, path: string, tensor: Tensor): Promise<void> {
  const { module, rest } = resolve(model, path)
  const original = originalOf(module, rest)
  if (original) {
    original.load(tensor)
    refreshCopies(model)
    return
  }
  if (!module.ownAccepts(rest)) {
    const names = [...module.ownParameters()].map(([name]) => name)
    tensor.dispose()
    throw new HalfbyteError(
      'ERR_HALFBYTE_STATE_DICT',
      `loadParameter: the model has no '${path}' (${module.constructor.name} has ${names.join(', ') || 'no parameters'})`,
    )
  }
  for (const [name, parameter] of module.ownParameters()) {
    parameter.path ||= rest === name ? path : path.slice(0, path.length - rest.length) + name
  }
  await module.ownLoad(rest, tensor)
  const own = new Map(module.ownParameters()).get(rest)
  if (tiedCopies(model).some(({ of }) => of === own)) refreshCopies(model)
}

export function missingParameters(model: Module): string[] {
  const missing: string[] = []
  const seen = new Set<object>()
  for (const [prefix, module] of places(model)) {
    const own = new Map(module.ownParameters())
    for (const name of module.ownMissing()) {
      const place = own.get(name)
      if (place && seen.has(place.identity)) continue
      if (place) seen.add(place.identity)
      missing.push(join(prefix, name))
    }
  }
  return missing
}
