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

export async function runScript(name: string, args: string[] = [], flags: string[] = []): Promise<Outcome> {
  const script = join(root, 'test', 'runtime', 'scripts', name)
  const child = spawn(process.execPath, [...flags, script, ...args], { stdio: ['ignore', 'pipe', 'pipe'] })
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
