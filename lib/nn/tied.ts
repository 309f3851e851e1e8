/** Copies of tied parameters, for models that are spread over devices more than one of which need them. */
import type { Module } from './module.js'
import type { Buffer, Parameter } from './parameter.js'

/** A tensor that a second device needs too. State dicts and counts of parameters leave the copy out. */
export interface TiedCopy {
  copy: Buffer
  of: Parameter
}

const copiesOf = new WeakMap<Module, readonly TiedCopy[]>()

/** The copies that a model, or the model that a module is part of, has. */
export function tiedCopies(module: Module): readonly TiedCopy[] {
  return copiesOf.get(module) ?? []
}

export function setTiedCopies(model: Module, copies: readonly TiedCopy[]): void {
  if (copies.length === 0) return
  for (const { of } of copies) {
    of.refuseGradient('a device map has it on several devices, and what the copies learn would be lost')
  }
  for (const module of model.modules()) copiesOf.set(module, copies)
}

/** What a module's own parameter is a copy of, if it is one. */
export function originalOf(module: Module, name: string): Parameter | undefined {
  const copies = tiedCopies(module)
  if (copies.length === 0) return undefined
  const own = new Map(module.ownParameters()).get(name)
  return copies.find(({ copy }) => copy === own)?.of
}

/** Gives the copies the values and dtypes of what they are copies of. */
export function refreshCopies(module: Module): void {
  for (const { copy, of } of tiedCopies(module)) {
    if (!of.isLoaded) continue
    const value = of.share()
    const moved = value.to(copy.device!)
    if (moved !== value) value.dispose()
    copy.tensor?.dispose()
    copy.replace(moved)
  }
}
