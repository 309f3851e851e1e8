/** A tree of modules as text, as Python prints it: what `console.log(model)` shows. */
import type { Module } from './module.js'

/** Those that are being printed: a module that is among them is a part of itself. */
const printing = new Set<Module>()

export function treeText(module: Module): string {
  if (printing.has(module)) return `${module.constructor.name}(...)`
  printing.add(module)
  try {
    return textOf(module)
  } finally {
    printing.delete(module)
  }
}

/** Children that are alike and follow one another are one entry: (0-3): 4 x DecoderLayer(...). */
function textOf(module: Module): string {
  const runs: { names: string[]; text: string }[] = []
  for (const [name, child] of module.namedChildren()) {
    const text = child.toString()
    const last = runs.at(-1)
    if (last?.text === text && /^\d+$/.test(name)) last.names.push(name)
    else runs.push({ names: [name], text })
  }
  const head = module.constructor.name
  const facts = [...module.ownParameters()]
    .map(([own, { dtype, shape }]) => `${own}: ${dtype ? `${dtype} ` : ''}[${shape.join(', ')}]`)
    .join(', ')
  if (runs.length === 0) return `${head}(${facts})`
  const lines = runs.map(({ names, text }) => {
    const many = names.length > 1
    const label = many ? `(${names[0]}-${names.at(-1)}): ${names.length} x ` : `(${names[0]}): `
    return `  ${label}${text.replaceAll('\n', '\n  ')}`
  })
  return [`${head}(`, ...(facts ? [`  ${facts}`] : []), ...lines, ')'].join('\n')
}
