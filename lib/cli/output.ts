/** What commands print: text or one JSON object on stdout, one line about an error on stderr. */
import { HalfbyteError } from '../errors.js'

export function print(text: string): void {
  process.stdout.write(`${text}\n`)
}

export function printJson(value: unknown): void {
  print(JSON.stringify(value, undefined, 2))
}

/** `halfbyte: what went wrong (CODE)`, on one line. Something that is no HalfbyteError is a bug: its stack is shown. */
export function describeError(error: unknown): string {
  if (error instanceof HalfbyteError) {
    const message = error.message.replace(/\s*\n\s*/g, ' ')
    return `halfbyte: ${message} (${error.code})`
  }
  const code = (error as NodeJS.ErrnoException | undefined)?.code
  if (error instanceof Error && code !== undefined) return `halfbyte: ${error.message} (${code})`
  return `halfbyte: ${error instanceof Error ? error.stack : String(error)}`
}
