/** The root of the sources and temporary folders. */
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

export const root = join(__dirname, '..', '..')

/** A folder that is removed after the tests of the file. */
export function temporaryFolder(): string {
  const folder = mkdtempSync(join(tmpdir(), 'halfbyte-'))
  afterAll(() => rmSync(folder, { recursive: true, force: true }))
  return folder
}

/** Paths in a temporary folder, another one at each call. */
export function temporaryFolders(): () => string {
  const folder = temporaryFolder()
  let made = 0
  return () => join(folder, String(made++))
}
