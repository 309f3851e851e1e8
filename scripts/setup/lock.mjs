// One set-up at a time in a folder: a file that holds the owner's process id. The file of a process that has died is
// taken over.
import { linkSync, mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs'
import { dirname } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'

function isAlive(pid) {
  try {
    process.kill(pid, 0)
    return true
  } catch (error) {
    return error.code === 'EPERM'
  }
}

function ownerOf(path) {
  try {
    return Number(readFileSync(path, 'utf8')) || 0
  } catch {
    return undefined
  }
}

/** Takes the file of a dead owner away; puts it back when a live process had just made it anew. */
function evict(path, dead) {
  const aside = `${path}.${process.pid}`
  try {
    renameSync(path, aside)
    if (ownerOf(aside) !== dead) linkSync(aside, path)
  } catch (error) {
    if (error.code !== 'ENOENT' && error.code !== 'EEXIST') throw error
  }
  rmSync(aside, { force: true })
}

/** Waits for the lock; returns the function that gives it back. */
export async function acquire(path) {
  mkdirSync(dirname(path), { recursive: true })
  const mine = `${path}.${process.pid}.new`
  writeFileSync(mine, String(process.pid))
  let told = false
  try {
    for (;;) {
      try {
        linkSync(mine, path) // made whole, or not at all
        break
      } catch (error) {
        if (error.code !== 'EEXIST') throw error
      }
      const owner = ownerOf(path)
      if (owner !== undefined && !isAlive(owner)) {
        evict(path, owner)
        continue
      }
      if (owner !== undefined && !told) {
        process.stderr.write(`Another set-up (process ${owner}) is at work here; waiting for it.\n`)
        told = true
      }
      await sleep(200)
    }
  } finally {
    rmSync(mine, { force: true })
  }
  return () => {
    if (ownerOf(path) === process.pid) rmSync(path, { force: true })
  }
}
