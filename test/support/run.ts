/** Node processes on the scripts of test/runtime/scripts, which use the compiled library in dist/. */
import { spawn } from 'node:child_process'
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { root } from './files'

export interface Outcome {
  code: number | null
  signal: NodeJS.Signals | null
  stdout: string
  stderr: string
}

export const isCompiled = existsSync(join(root, 'dist', 'index.js'))

/** it(), or a skipped test that says what is missing. */
export const itCompiled: typeof it = isCompiled
  ? it
  : (((name: string) => it.skip(`${name} (no dist/: npm run build:ts)`, () => undefined)) as typeof it)

/** `flags` are Node's own; `env` is added to this process's; `through` is a command that runs the one it is given. */
export async function runScript(
  name: string,
  args: string[] = [],
  flags: string[] = [],
  { env = {}, through = [] }: { env?: Record<string, string>; through?: string[] } = {},
): Promise<Outcome> {
  const script = join(root, 'test', 'runtime', 'scripts', name)
  const [command, ...rest] = [...through, process.execPath, ...flags, script, ...args]
  const child = spawn(command!, rest, {
    stdio: ['ignore', 'pipe', 'pipe'],
    env: { ...process.env, ...env },
  })
  let stdout = ''
  let stderr = ''
  child.stdout.on('data', (chunk: Buffer) => (stdout += chunk.toString()))
  child.stderr.on('data', (chunk: Buffer) => (stderr += chunk.toString()))
  return new Promise((resolve, reject) => {
    child.on('error', reject)
    child.on('close', (code, signal) => resolve({ code, signal, stdout, stderr }))
  })
}

/** The outcome of a script that went well and printed this. */
export const printed = (stdout: string): Outcome => ({ code: 0, signal: null, stdout, stderr: '' })
