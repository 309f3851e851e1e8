// Copies the addon that setup.mjs built last to prebuilds/, the place where a published package carries it.
import { copyFileSync, existsSync, mkdirSync, statSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const [built] = ['build-cmake', 'build']
  .map((folder) => join(root, folder, 'Release/halfbyte.node'))
  .filter((path) => existsSync(path))
  .sort((a, b) => statSync(b).mtimeMs - statSync(a).mtimeMs)
if (!built) throw new Error('There is no addon to copy: run node scripts/setup.mjs first.')
const folder = join(root, 'prebuilds', `${process.platform}-${process.arch}`)
mkdirSync(folder, { recursive: true })
copyFileSync(built, join(folder, 'halfbyte.node'))
