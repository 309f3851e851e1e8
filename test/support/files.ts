/** Temporary folders, fixtures and golden data. */
import { existsSync, mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

export const root = join(__dirname, '..', '..')
export const fixtures = join(root, 'test', 'fixtures')

/** A folder that is removed after the tests of the file. */
export function temporaryFolder(): string {
  const folder = mkdtempSync(join(tmpdir(), 'halfbyte-'))
  afterAll(() => rmSync(folder, { recursive: true, force: true }))
  return folder
}

/** The path of golden data: committed under test/fixtures, else in HALFBYTE_GOLDEN, else undefined. */
export function golden(path: string): string | undefined {
  const committed = join(fixtures, path)
  if (existsSync(committed)) return committed
  const folder = process.env['HALFBYTE_GOLDEN']
  const found = folder && join(folder, path)
  return found && existsSync(found) ? found : undefined
}

/** it(), or a skipped test that says which golden data are missing. */
export function itWithGolden(path: string, name: string, body: (path: string) => Promise<void> | void): void {
  const found = golden(path)
  if (found) it(name, async () => body(found))
  else it.skip(`${name} (no ${path}: set HALFBYTE_GOLDEN to the golden data)`, () => undefined)
}
