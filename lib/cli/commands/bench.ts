/** halfbyte bench: runs the benchmarks of bench/, the same files that run on their own. */
import { existsSync, readdirSync } from 'node:fs'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { abortable } from '../../abortable.js'
import { commonOptions } from '../options.js'
import { usageError, type Command } from '../command.js'
import { print } from '../output.js'

const FOLDER = join(__dirname, '..', '..', 'bench')

/** The side of bench/support/benchmark.ts that is called from here. */
interface BenchmarkModule {
  runBenchmark: (
    benchmark: { name: string; summary: string },
    options: {
      device?: string | undefined
      json: boolean
      out?: string | undefined
      model?: string | undefined
      rounds?: number | undefined
    },
  ) => Promise<void>
}

function names(): string[] {
  if (!existsSync(FOLDER)) return []
  return readdirSync(FOLDER)
    .filter((file) => file.endsWith('.js'))
    .map((file) => file.slice(0, -'.js'.length))
    .sort()
}

async function load(name: string): Promise<{ name: string; summary: string }> {
  const module = (await import(pathToFileURL(join(FOLDER, `${name}.js`)).href)) as Record<string, unknown>
  return module[name] as { name: string; summary: string }
}

export const bench: Command = {
  name: 'bench',
  summary: 'Runs benchmarks; without a name it lists them.',
  arguments: '[NAME...]',
  count: [0, 100],
  options: [
    [
      'Options',
      {
        all: { help: 'every benchmark' },
        model: { value: 'DIR', help: 'checkpoint for the benchmarks that load one' },
        rounds: { value: 'N', help: 'rounds of measuring (default 7)' },
        out: { value: 'DIR', help: 'also write NAME.json to this folder' },
        ...commonOptions,
      },
    ],
  ],
  async run({ positionals, flags, signal }) {
    const present = names()
    const unknown = positionals.find((name) => !present.includes(name))
    if (unknown !== undefined) {
      throw usageError(
        `there is no benchmark ${JSON.stringify(unknown)}; there are ${present.join(', ') || 'none'}`,
      )
    }
    const chosen = flags.switch('all') ? present : positionals
    if (chosen.length === 0) {
      for (const name of present) print(`${name.padEnd(14)}${(await load(name)).summary}`)
      return
    }
    const frame = pathToFileURL(join(FOLDER, 'support', 'benchmark.js')).href
    const { runBenchmark } = (await import(frame)) as BenchmarkModule
    const out = flags.text('out')
    for (const [i, name] of chosen.entries()) {
      if (i > 0 && !flags.switch('json')) print('')
      const running = runBenchmark(await load(name), {
        device: flags.text('device'),
        json: flags.switch('json'),
        out: out === undefined ? undefined : join(out, `${name}.json`),
        model: flags.text('model'),
        rounds: flags.number('rounds', { min: 1, whole: true }),
      })
      await abortable(running, signal)
    }
  },
}
