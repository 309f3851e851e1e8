/** Reading the JSON files of a checkpoint folder. */
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

/** The object in a JSON file; undefined when there is no such file. */
export function readJsonFile(
  path: string,
  code: ErrorCode = 'ERR_HALFBYTE_CHECKPOINT',
): Record<string, unknown> | undefined {
  let text: string
  try {
    text = readFileSync(path, 'utf8')
  } catch (cause) {
    if ((cause as NodeJS.ErrnoException).code === 'ENOENT') return undefined
    throw new HalfbyteError('ERR_HALFBYTE_IO', `${path}: cannot be read (${(cause as Error).message})`, {
      cause,
    })
  }
  let value: unknown
  try {
    value = JSON.parse(text)
  } catch (cause) {
    throw new HalfbyteError(code, `${path}: not JSON (${(cause as Error).message})`, { cause })
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw new HalfbyteError(code, `${path}: ${basename(path)} must hold an object`)
  }
  return value as Record<string, unknown>
}
