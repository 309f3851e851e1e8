/** Which linear layers stay as they are: output heads and what is tied to them, routers, and the user's list. */
import { Embedding } from '../nn/embedding.js'
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
}

/** Reasons to keep linear layers, by path. */
export function keptByStructure(model: Module & OutputEmbeddings): Map<string, string> {
  const kept = new Map<string, string>()
  const modules = [...model.namedModules()]
  const linears = modules.filter((entry): entry is [string, Linear] => entry[1] instanceof Linear)

  const output = model.getOutputEmbeddings?.()
  for (const [path, module] of linears) {
    if (module === output) kept.set(path, 'output head')
    else if (path.split('.').some((segment) => HEADS.has(segment)))
      kept.set(path, 'output head (by its name)')
  }

  // a weight in two places cannot be packed in one of them
  const owners = new Map<object, [string, Module][]>()
  for (const entry of modules) {
    for (const [, parameter] of entry[1].ownParameters()) {
      owners.set(parameter.identity, [...(owners.get(parameter.identity) ?? []), entry])
    }
  }
  for (const [path, module] of linears) {
    const partners = owners.get(module.weight.identity)!.filter(([, other]) => other !== module)
    if (partners.length > 0) {
      const names = partners.map(([other]) => other).join(', ')
      const why = `its weight is tied to ${names}`
      kept.set(path, kept.has(path) ? `${kept.get(path)}; ${why}` : why)
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
    if (table) kept.set(path, `output head (one score for each row of ${table[0]})`)
  }

  for (const [parentPath, parent] of modules) {
    const names = new Map(parent.namedChildren())
    const routes = names.has('experts') || [...names.keys()].some((name) => name.startsWith('experts.'))
    for (const [name, child] of names) {
      if (!(child instanceof Linear)) continue
      if (name === 'router' || (routes && /(^|_)gate$/.test(name))) {
        kept.set(parentPath === '' ? name : `${parentPath}.${name}`, 'router')
      }
    }
  }
  return kept
}
