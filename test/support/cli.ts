/** The program as a shell runs it. Needs dist/, which `npm test` makes first. */
import { spawnSync } from 'node:child_process'
import { join } from 'node:path'
import { root } from './files'

export const program = join(root, 'dist', 'cli', 'main.js')

export function halfbyte(args: readonly string[], input?: string) {
  return spawnSync(process.execPath, [program, ...args], { encoding: 'utf8', input })
}
