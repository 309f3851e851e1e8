/**
 * What a command of `halfbyte` is: its options as data, from which the parser and the help text are made.
 */
import { parseArgs } from 'node:util'
import { HalfbyteError } from '../errors.js'

export interface OptionSpec {
  /** Name of the value in the help text; without one the option is a switch. */
  value?: string
  help: string
  /** May be given more than once. */
  multiple?: boolean
  short?: string
}

export type OptionTable = Readonly<Record<string, OptionSpec>>

export interface Invocation {
  positionals: string[]
  flags: Flags
  /** Aborted by Ctrl-C. */
  signal: AbortSignal
}

export interface Command {
  name: string
  summary: string
  /** Positional arguments as the usage line shows them. */
  arguments: string
  /** Fewest and most positional arguments. */
  count: readonly [number, number]
  /** Groups of options under their headings. */
  options: readonly (readonly [string, OptionTable])[]
  /** Further text at the end of the help. */
  notes?: string
  run(invocation: Invocation): Promise<void>
}

export function usageError(message: string): HalfbyteError {
  return new HalfbyteError('ERR_HALFBYTE_USAGE', message)
}

/** The options that were given, read by type; a value of the wrong kind is a usage error. */
export class Flags {
  readonly #values: Readonly<Record<string, unknown>>

  constructor(values: Readonly<Record<string, unknown>>) {
    this.#values = values
  }

  has(name: string): boolean {
    return this.#values[name] !== undefined
  }

  switch(name: string): boolean {
    return this.#values[name] === true
  }

  text(name: string): string | undefined {
    return this.#values[name] as string | undefined
  }

  texts(name: string): string[] {
    return (this.#values[name] as string[] | undefined) ?? []
  }

  choice<T extends string>(name: string, choices: readonly T[]): T | undefined {
    const value = this.text(name)
    if (value === undefined || choices.includes(value as T)) return value as T | undefined
    throw usageError(`--${name} is ${JSON.stringify(value)}; it may be ${choices.join(', ')}`)
  }

  number(name: string, range: { min?: number; max?: number; whole?: boolean } = {}): number | undefined {
    const value = this.text(name)
    if (value === undefined) return undefined
    const { min = -Infinity, max = Infinity, whole = false } = range
    const number = value.trim() === '' ? NaN : Number(value)
    if (
      Number.isFinite(number) &&
      number >= min &&
      number <= max &&
      (!whole || Number.isSafeInteger(number))
    ) {
      return number
    }
    const bounds = [
      ...(min > -Infinity ? [`at least ${min}`] : []),
      ...(max < Infinity ? [`at most ${max}`] : []),
    ].join(' and ')
    throw usageError(
      `--${name} is ${JSON.stringify(value)}; it must be a ${whole ? 'whole ' : ''}number${bounds && ` of ${bounds}`}`,
    )
  }
}

function allOptions(command: Command): OptionTable {
  return Object.assign({}, ...command.options.map(([, table]) => table)) as OptionTable
}

/** Reads the command line of one command. */
export function parse(command: Command, args: readonly string[]): { positionals: string[]; flags: Flags } {
  const options = Object.fromEntries(
    Object.entries(allOptions(command)).map(([name, spec]) => [
      name,
      {
        type: spec.value === undefined ? ('boolean' as const) : ('string' as const),
        ...(spec.multiple ? { multiple: true } : {}),
        ...(spec.short === undefined ? {} : { short: spec.short }),
      },
    ]),
  )
  let parsed
  try {
    parsed = parseArgs({ args: [...args], options, allowPositionals: true, strict: true })
  } catch (error) {
    // The first sentence names the option; what follows is about quoting.
    const [first] = (error as Error).message.split(/\.\s/)
    const message = first!.replace('is ambiguous', 'begins with a dash: write --option=-value')
    throw usageError(`${message}. See halfbyte ${command.name} --help`)
  }
  return { positionals: parsed.positionals, flags: new Flags(parsed.values) }
}

function usage(command: Command): string {
  return `halfbyte ${command.name} ${command.arguments}`.trimEnd()
}

export function checkCount(command: Command, positionals: readonly string[]): void {
  const [least, most] = command.count
  if (positionals.length >= least && positionals.length <= most) return
  const what = positionals.length < least ? 'something is missing' : `${positionals.at(-1)} is too much`
  throw usageError(`${what}: ${usage(command)}. See halfbyte ${command.name} --help`)
}

export function helpText(command: Command): string {
  const tables = command.options.map(([heading, table]) => {
    const rows = Object.entries(table).map(([name, spec]) => {
      const short = spec.short === undefined ? '' : `-${spec.short}, `
      return [`  ${short}--${name}${spec.value === undefined ? '' : ` ${spec.value}`}`, spec.help] as const
    })
    return { heading, rows }
  })
  const width = Math.max(...tables.flatMap(({ rows }) => rows.map(([left]) => left.length))) + 2
  const sections = tables.map(({ heading, rows }) =>
    [`${heading}:`, ...rows.map(([left, help]) => left.padEnd(width) + help)].join('\n'),
  )
  return [
    `${usage(command)}\n\n${command.summary}`,
    ...sections,
    ...(command.notes === undefined ? [] : [command.notes]),
  ].join('\n\n')
}
