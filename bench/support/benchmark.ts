/**
 * What a benchmark is and how it is run: as a script (`node dist/bench/linear4bit.js --json`) or by
 * `halfbyte bench NAME`, which calls the same files. It prints a table or JSON, and fails when a row has no baseline of
 * the same run to be compared with.
 */
import { mkdirSync, writeFileSync } from 'node:fs'
import { dirname } from 'node:path'
import { parseArgs } from 'node:util'
import { defaultDevice, device as openDevice, HalfbyteError, type Device } from 'halfbyte'
import { formatTable } from 'halfbyte/internal/cli/table.js'
import { machine } from './machine.js'

export type Row = Record<string, number | string>

export interface Report {
  /** Heading of the table's columns by the keys of the rows. */
  columns: Record<string, string>
  rows: Row[]
  /** Column of the baseline, measured in the same run: every row must have a positive number there. */
  baseline: string
  /** Lines under the table. */
  notes: string[]
}

export interface Context {
  device: Device
  /** A checkpoint's folder; undefined for the one in models/. */
  model: string | undefined
  /** Rounds of measuring. */
  rounds: number
}

export interface Benchmark {
  name: string
  summary: string
  run(context: Context): Promise<Report>
}

export interface BenchOptions {
  device?: string | undefined
  json?: boolean | undefined
  out?: string | undefined
  model?: string | undefined
  rounds?: number | undefined
}

function display(value: number | string | undefined): number | string {
  if (typeof value !== 'number' || Number.isInteger(value)) return value ?? '-'
  const size = Math.abs(value)
  return value.toFixed(size >= 1000 ? 0 : size >= 100 ? 1 : size >= 1 ? 2 : 3)
}

/** Runs a benchmark and prints what it found. */
export async function runBenchmark(benchmark: Benchmark, options: BenchOptions): Promise<void> {
  const device = options.device === undefined ? defaultDevice() : openDevice(options.device)
  const { name, summary } = benchmark
  // a folder that cannot be made is better known before the measurement than after it
  if (options.out !== undefined) mkdirSync(dirname(options.out), { recursive: true })
  const report = await benchmark.run({ device, model: options.model, rounds: options.rounds ?? 7 })
  const complete = {
    name,
    device: device.name,
    date: new Date().toISOString(),
    machine: machine(),
    ...report,
  }
  const json = JSON.stringify(complete, undefined, 2)
  if (options.out !== undefined) writeFileSync(options.out, `${json}\n`)
  if (options.json) process.stdout.write(`${json}\n`)
  else {
    const { cpu, isa, threads } = complete.machine
    const keys = Object.keys(report.columns)
    const table = formatTable(
      Object.values(report.columns),
      report.rows.map((row) => keys.map((key) => display(row[key]))),
    )
    const lines = [
      `${name}: ${summary}`,
      `${device.name} on ${cpu}, ${isa}, ${threads} threads`,
      '',
      table,
      '',
      ...report.notes,
    ]
    process.stdout.write(`${lines.join('\n').trimEnd()}\n`)
  }
  const bare = report.rows.filter((row) => !(Number(row[report.baseline]) > 0))
  if (report.rows.length === 0 || bare.length > 0) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_INTERNAL',
      `bench ${name}: ${bare.length} of ${report.rows.length} rows lack the baseline ${report.baseline}`,
    )
  }
}

/** For the end of a benchmark's file: runs it when the file is the program. */
export function runAsProgram(benchmark: Benchmark, module: NodeJS.Module): void {
  if (require.main !== module) return
  const { values } = parseArgs({
    options: {
      device: { type: 'string' },
      json: { type: 'boolean' },
      out: { type: 'string' },
      model: { type: 'string' },
      rounds: { type: 'string' },
    },
  })
  const rounds = values.rounds === undefined ? undefined : Number(values.rounds)
  runBenchmark(benchmark, { ...values, rounds }).catch((error: unknown) => {
    console.error(error instanceof HalfbyteError ? `${error.code}: ${error.message}` : error)
    process.exitCode = 1
  })
}
