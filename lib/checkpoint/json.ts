/** Reading and writing the JSON files of a checkpoint folder. */
import { readFileSync } from 'node:fs'
import { basename } from 'node:path'
import { HalfbyteError, type ErrorCode } from '../errors.js'

/** A key that some object in a valid JSON text has twice (JSON.parse would keep the last one), or undefined. */
export function duplicateKey(text: string): string | undefined {
  const open: (Set<string> | undefined)[] = []
  let expectsKey = false
  for (let i = 0; i < text.length; i++) {
    switch (text.charCodeAt(i)) {
      case 0x7b: // {
        open.push(new Set())
        expectsKey = true
        break
      case 0x5b: // [
        open.push(undefined)
        expectsKey = false
        break
      case 0x7d: // }
      case 0x5d: // ]
        open.pop()
        expectsKey = false
        break
      case 0x2c: // ,
        expectsKey = open.at(-1) !== undefined
        break
      case 0x22: {
        // "
        let end = i + 1
        while (text.charCodeAt(end) !== 0x22) end += text.charCodeAt(end) === 0x5c ? 2 : 1
        if (expectsKey) {
          const key = JSON.parse(text.slice(i, end + 1)) as string
          const keys = open.at(-1)!
          if (keys.has(key)) return key
          keys.add(key)
          expectsKey = false
        }
        i = end
        break
      }
    }
  }
  return undefined
}

/** A value as some file has it written: 1e-05 stays 1e-05, and 6.0 does not become a whole number to other readers. */
export class JsonText {
  readonly text: string

  constructor(text: string) {
    this.text = text
  }
}

/** The values of an object's members, by name, as a valid JSON text has them. */
export function memberTexts(text: string): Map<string, JsonText> {
  const members = new Map<string, JsonText>()
  let depth = 0
  let key = ''
  let begin = 0
  const end = (at: number) => {
    const value = text.slice(begin, at).trim()
    if (value !== '') members.set(key, new JsonText(value))
  }
  for (let i = 0; i < text.length; i++) {
    const c = text[i]!
    if (c === '"') {
      const start = i++
      while (text[i] !== '"') i += text[i] === '\\' ? 2 : 1
      // a string at this depth is a key until its colon has come
      if (depth === 1 && begin < 0) key = JSON.parse(text.slice(start, i + 1)) as string
    } else if (c === ':' && depth === 1 && begin < 0) begin = i + 1
    else if (c === ',' && depth === 1) {
      end(i)
      begin = -1
    } else if (c === '{' || c === '[') {
      if (++depth === 1) begin = -1
    } else if ((c === '}' || c === ']') && --depth === 0 && begin >= 0) end(i)
  }
  return members
}

/** JSON with two spaces to a level, as Python's json.dumps(indent=2) writes it, and texts as they are. */
export function jsonText(value: unknown, indent = ''): string {
  if (value instanceof JsonText) return value.text
  if (typeof value !== 'object' || value === null) return JSON.stringify(value)
  const inner = `${indent}  `
  const list = Array.isArray(value)
  const parts = list
    ? value.map((item) => jsonText(item, inner))
    : Object.entries(value)
        .filter(([, item]) => item !== undefined)
        .map(([key, item]) => `${JSON.stringify(key)}: ${jsonText(item, inner)}`)
  const [open, close] = list ? '[]' : '{}'
  if (parts.length === 0) return `${open}${close}`
  return `${open}\n${inner}${parts.join(`,\n${inner}`)}\n${indent}${close}`
}

/** What is said of a file that Git left in place of the one it stands for; undefined where `text` begins otherwise. */
export function lfsPointer(text: string): string | undefined {
  if (!text.startsWith('version https://git-lfs')) return undefined
  return 'a pointer of Git LFS, not the file itself; fetch that with `git lfs pull`'
}

/** The text of a file; undefined when there is no such file. */
export function readTextFile(path: string): string | undefined {
  try {
    return readFileSync(path, 'utf8')
  } catch (cause) {
    if ((cause as NodeJS.ErrnoException).code === 'ENOENT') return undefined
    throw new HalfbyteError('ERR_HALFBYTE_IO', `${path}: cannot be read (${(cause as Error).message})`, {
      cause,
    })
  }
}

/** The object in a JSON file; undefined when there is no such file. */
export function readJsonFile(
  path: string,
  code: ErrorCode = 'ERR_HALFBYTE_CHECKPOINT',
): Record<string, unknown> | undefined {
  const text = readTextFile(path)
  return text === undefined ? undefined : parseObject(text, path, code)
}

/** The object that the text of a file holds. */
export function parseObject(text: string, path: string, code: ErrorCode): Record<string, unknown> {
  let value: unknown
  try {
    value = JSON.parse(text)
  } catch (cause) {
    const why = lfsPointer(text) ?? `not JSON (${(cause as Error).message})`
    throw new HalfbyteError(code, `${path}: ${why}`, { cause })
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw new HalfbyteError(code, `${path}: ${basename(path)} must hold an object`)
  }
  return value as Record<string, unknown>
}
