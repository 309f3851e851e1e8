#!/usr/bin/env node
/**
 * The command `halfbyte`: finds the subcommand, reads its options, runs it.
 * Exit status: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C.
 */
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { HalfbyteError } from '../errors.js'
import { checkCount, helpText, parse, usageError, type Command } from './command.js'
import { describeError, print } from './output.js'

/** Loaded when they are asked for: `doctor` must run where the addon does not load. */
const COMMANDS: Readonly<Record<string, () => Promise<Command>>> = {
  generate: async () => (await import('./commands/generate.js')).generate,
  quantize: async () => (await import('./commands/quantize.js')).quantize,
  eval: async () => (await import('./commands/eval.js')).evaluate,
  inspect: async () => (await import('./commands/inspect.js')).inspect,
  doctor: async () => (await import('./commands/doctor.js')).doctor,
  bench: async () => (await import('./commands/bench.js')).bench,
}

const OVERVIEW = `halfbyte COMMAND ...

  generate DIR    continue a prompt, as it is generated
  quantize DIR    write a checkpoint quantised to 4 or 8 bits
  eval DIR        perplexity on a text
  inspect DIR     modules, kinds, shapes and bytes of a model
  doctor          what the library found on this machine, and what is missing
  bench [NAME]    benchmarks

halfbyte COMMAND --help tells more; --json and --device are understood by all.`

function version(): string {
  const manifest = join(__dirname, '..', '..', 'package.json')
  return (JSON.parse(readFileSync(manifest, 'utf8')) as { version: string }).version
}

async function run(args: readonly string[], signal: AbortSignal): Promise<void> {
  const [name, ...rest] = args
  if (name === 'help' && rest.length > 0) return run([...rest, '--help'], signal)
  if (name === undefined || name === '--help' || name === '-h' || name === 'help') {
    print(OVERVIEW)
    if (name === undefined) process.exitCode = 2
    return
  }
  if (name === '--version' || name === '-v') {
    print(version())
    return
  }
  if (!Object.hasOwn(COMMANDS, name)) {
    throw usageError(
      `there is no command ${JSON.stringify(name)}; the commands are ${Object.keys(COMMANDS).join(', ')}`,
    )
  }
  const command = await COMMANDS[name]!()
  const { positionals, flags } = parse(command, rest)
  if (flags.switch('help')) {
    print(helpText(command))
    return
  }
  checkCount(command, positionals)
  await command.run({ positionals, flags, signal })
}

function main(): void {
  // A reader that has gone (| head) is no error.
  process.stdout.on('error', (error: NodeJS.ErrnoException) => {
    if (error.code === 'EPIPE') process.exit(0)
    process.stderr.write(`${describeError(error)}\n`, () => process.exit(1))
  })
  const interrupt = new AbortController()
  process.on('SIGINT', () => {
    if (interrupt.signal.aborted) process.exit(130)
    interrupt.abort()
  })
  run(process.argv.slice(2), interrupt.signal)
    .catch((error: unknown) => {
      if (interrupt.signal.aborted) return
      process.stderr.write(`${describeError(error)}\n`)
      process.exitCode = error instanceof HalfbyteError && error.code === 'ERR_HALFBYTE_USAGE' ? 2 : 1
    })
    .finally(() => {
      // at once: work that is queued would be waited for
      if (interrupt.signal.aborted) process.exit(130)
    })
}

main()
