/** Which linear layers stay as they are: output heads and what is tied to them, routers, and the user's list. */
import { Embedding } from '../nn/embedding.js'
import { FusedExperts } from '../nn/experts.js'
import { Linear } from '../nn/linear.js'
import type { Module } from '../nn/module.js'

/** Names that output heads have in the model families of the Hub. */
const HEADS = new Set(['lm_head', 'embed_out', 'score', 'classifier', 'qa_outputs'])

function segmentPattern(segment: string): RegExp {
  const source = segment
    .replace(/[.+^${}()|[\]\\]/g, '\\$&')
    .replace(/\*/g, '.*')
    .replace(/\?/g, '.')
  return new RegExp(`^${source}$`)
}

function matchesFrom(pattern: readonly string[], path: readonly string[]): boolean {
  const [head, ...rest] = pattern
  if (head === undefined) return true
  if (head === '**') {
    return path.some((_, i) => matchesFrom(rest, path.slice(i))) || matchesFrom(rest, [])
  }
  return path.length > 0 && segmentPattern(head).test(path[0]!) && matchesFrom(rest, path.slice(1))
}

/**
 * Whether an entry of a skip list means a module: its dotted segments must equal segments of the path, one after the
 * other, anywhere in it. So 'v_proj' means every v_proj and no kv_proj, and 'layers.1' all in layer 1 and nothing in
 * layer 10. In a segment * stands for any characters and ? for one; ** stands for any number of segments.
 */
export function matchesModule(entry: string, path: string): boolean {
  const pattern = entry.split('.')
  const segments = path.split('.')
  return segments.some((_, i) => matchesFrom(pattern, segments.slice(i)))
}

/** What a model may say about itself. */
export interface OutputEmbeddings {
  getOutputEmbeddings?(): Module | null | undefined
  /** Modules that stay in float32, whatever the dtype of the rest; named as in skip lists. */
  readonly keepInFp32Modules?: readonly string[]
}

/** Why a linear layer stays as it is. */
export interface Kept {
  reason: string
  /** Python's library finds it by itself, without a list. */
  known: boolean
}

/** Whether a module is one that the model wants in float32. */
export function keepsFp32(model: OutputEmbeddings, path: string): boolean {
  return (model.keepInFp32Modules ?? []).some((entry) => matchesModule(entry, path))
}

/** Reasons to keep linear layers, by path. */
export function keptByStructure(model: Module & OutputEmbeddings): Map<string, Kept> {
  const kept = new Map<string, Kept>()
  const keep = (path: string, reason: string, known = true) => {
    const other = kept.get(path)
    kept.set(path, { reason: other ? `${other.reason}; ${reason}` : reason, known })
  }
  const modules = [...model.namedModules()]
  const linears = modules.filter((entry): entry is [string, Linear] => entry[1] instanceof Linear)

  const output = model.getOutputEmbeddings?.()
  for (const [path, module] of linears) {
    if (module === output) keep(path, 'output head')
    else if (path.split('.').some((segment) => HEADS.has(segment))) keep(path, 'output head (by its name)')
  }

  // a weight in two places cannot be packed in one of them
  const owners = new Map<object, [string, Module][]>()
  for (const entry of modules) {
    for (const [, parameter] of entry[1].ownParameters()) {
      const known = owners.get(parameter.identity)
      if (known) known.push(entry)
      else owners.set(parameter.identity, [entry])
    }
  }
  for (const [path, module] of linears) {
    const partners = owners.get(module.weight.identity)!.filter(([, other]) => other !== module)
    if (partners.length > 0) {
      const names = partners.map(([other]) => other).join(', ')
      keep(path, `its weight is tied to ${names}`)
    }
  }

  // a model that names no head still has one when its last linear layer scores the rows of an embedding table
  const last = linears.at(-1)
  if (kept.size === 0 && last) {
    const [path, head] = last
    const table = modules.find(
      ([, m]) =>
        m instanceof Embedding && m.numEmbeddings === head.outFeatures && m.embeddingDim === head.inFeatures,
    )
    if (table) keep(path, `output head (one score for each row of ${table[0]})`)
  }

  for (const [path, module] of modules) {
    const replaceable = module instanceof Linear || module instanceof FusedExperts
    if (replaceable && keepsFp32(model, path)) keep(path, 'it stays in float32')
  }

  for (const [parentPath, parent] of modules) {
    const names = new Map(parent.namedChildren())
    const routes = names.has('experts') || [...names.keys()].some((name) => name.startsWith('experts.'))
    for (const [name, child] of names) {
      if (!(child instanceof Linear)) continue
      if (name === 'router' || (routes && /(^|_)gate$/.test(name))) {
        keep(parentPath === '' ? name : `${parentPath}.${name}`, 'router', false)
      }
    }
  }
  return kept
}
