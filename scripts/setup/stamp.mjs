// Whether something built is up to date: a hash of what it was built from, kept in build-setup/. File times would say
// "stale" after every checkout and "fresh" after a build that was cut short.
import { createHash } from 'node:crypto'
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { dirname, join } from 'node:path'

function filesUnder(path) {
  if (!existsSync(path)) return []
  if (!statSync(path).isDirectory()) return [path]
  return readdirSync(path)
    .sort()
    .flatMap((name) => filesUnder(join(path, name)))
}

export function hashOf(root, paths, extra) {
  const hash = createHash('sha256').update(JSON.stringify(extra))
  for (const file of paths.flatMap((path) => filesUnder(join(root, path)))) {
    hash.update(`\0${file.slice(root.length)}\0`).update(readFileSync(file))
  }
  return hash.digest('hex')
}

export class Stamp {
  constructor(path, product, hash) {
    this.path = path
    this.product = product
    this.hash = hash
  }

  get fresh() {
    if (!existsSync(this.product) || !existsSync(this.path)) return false
    return readFileSync(this.path, 'utf8') === this.hash
  }

  clear() {
    rmSync(this.path, { force: true })
  }

  set() {
    mkdirSync(dirname(this.path), { recursive: true })
    writeFileSync(this.path, this.hash)
  }
}

/**
 * Whether node_modules holds what package-lock.json asks for. npm writes node_modules/.package-lock.json last, so an
 * install that was cut short has none.
 */
export function modulesMatch(root) {
  const installed = join(root, 'node_modules', '.package-lock.json')
  if (!existsSync(installed)) return false
  const want = JSON.parse(readFileSync(join(root, 'package-lock.json'), 'utf8')).packages
  const have = JSON.parse(readFileSync(installed, 'utf8')).packages
  for (const [path, entry] of Object.entries(want)) {
    if (path === '') continue
    const found = have[path]
    if (found ? found.version !== entry.version || found.integrity !== entry.integrity : !entry.optional) {
      return false
    }
  }
  return Object.keys(have).every((path) => path in want)
}
