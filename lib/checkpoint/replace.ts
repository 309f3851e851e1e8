/**
 * Files of a folder that are replaced together. They are written beside their places and flushed to the disk; then a
 * journal says what goes where, and from that moment the new files count: whoever opens the folder finishes what the
 * journal says. So a process that is killed leaves the older files or the newer ones. Readers that know no journal find no
 * weights while files are moved, rather than some of each: the file that they look for goes first and comes last.
 */
import { createHash, randomUUID } from 'node:crypto'
import {
  closeSync,
  existsSync,
  fsyncSync,
  lstatSync,
  openSync,
  readdirSync,
  renameSync,
  rmSync,
  statSync,
} from 'node:fs'
import { mkdir, open, realpath, rename, rm, type FileHandle } from 'node:fs/promises'
import { hostname } from 'node:os'
import { basename, dirname, join, resolve } from 'node:path'
import { HalfbyteError } from '../errors.js'
import { readTextFile } from './json.js'

export const SINGLE_FILE = 'model.safetensors'
export const INDEX_FILE = 'model.safetensors.index.json'

/** What readers look for. */
const HEADS = [SINGLE_FILE, INDEX_FILE]
const JOURNAL = '.halfbyte-save.json'

/** A failed write as an error that says which file it was about. */
export function writeError(path: string, cause: unknown): unknown {
  const code = (cause as NodeJS.ErrnoException | undefined)?.code
  if (cause instanceof HalfbyteError || code === undefined || !/^E[A-Z]+$/.test(code)) return cause
  const what = WHY[code] ?? (cause as Error).message
  const message = `${path} was not written: ${what}. What was there before is untouched`
  return new HalfbyteError('ERR_HALFBYTE_IO', message, { cause })
}

const WHY: Readonly<Record<string, string>> = {
  ENOSPC: 'the disk is full (ENOSPC)',
  EDQUOT: 'the disk quota is used up (EDQUOT)',
  EFBIG: 'the file would be larger than the process or the file system allows (EFBIG)',
}

/**
 * Creates a folder and those above it. One level at a time: Node's own recursive mkdir never returns where a folder is
 * refused as not there although its parent is, as in /proc.
 */
export async function makeFolder(folder: string): Promise<void> {
  if (typeof folder !== 'string' || folder.includes('\0')) {
    throw new HalfbyteError('ERR_HALFBYTE_VALUE', `${JSON.stringify(folder)} is not the path of a folder`)
  }
  try {
    const above = dirname(resolve(folder))
    if (!existsSync(above)) await makeFolder(above)
    await mkdir(folder)
  } catch (cause) {
    const exists = (cause as NodeJS.ErrnoException).code === 'EEXIST'
    if (exists && statSync(folder, { throwIfNoEntry: false })?.isDirectory()) return
    throw writeError(folder, cause)
  }
}

// -- files beside their places

/** Says whose a temporary file is: `model.safetensors.<host>-<process>-<random>.tmp`. */
const HOST = createHash('sha256').update(hostname()).digest('hex').slice(0, 8)
const TEMPORARY = /\.([0-9a-f]{8})-(\d+)-[0-9a-f]{12}\.tmp$/
const DAY = 24 * 3600 * 1000

/** What nobody will miss when this process is gone; the next replacement in the folder removes it. */
export function temporaryName(name: string): string {
  return `${name}.${HOST}-${process.pid}-${randomUUID().slice(-12)}.tmp`
}

function isRunning(pid: number): boolean {
  try {
    process.kill(pid, 0)
    return true
  } catch (error) {
    return (error as NodeJS.ErrnoException).code !== 'ESRCH'
  }
}

/** Removes what saves that were killed have left: of processes that are gone, or of another machine and old. */
function removeAbandoned(folder: string): void {
  try {
    for (const name of readdirSync(folder)) {
      const [, host, pid] = TEMPORARY.exec(name) ?? []
      if (host === undefined) continue
      const path = join(folder, name)
      const age = Date.now() - (statSync(path, { throwIfNoEntry: false })?.mtimeMs ?? Infinity)
      if (host === HOST ? !isRunning(Number(pid)) : age > DAY) rmSync(path, { force: true })
    }
  } catch {
    // they are in nobody's way
  }
}

// -- the journal

interface Journal {
  /** Temporary names and the names that they get. */
  moves: [string, string][]
  removed: string[]
}

/** Whether a name is that of a file beside another, no path to anywhere else. */
export function isPlainName(name: unknown): name is string {
  return typeof name === 'string' && name !== '' && basename(name) === name && !/[\\\0]|^\.\.?$/.test(name)
}

function parseJournal(text: string): Journal | undefined {
  try {
    const { moves, removed } = JSON.parse(text) as Partial<Journal>
    const known =
      Array.isArray(moves) &&
      moves.every(([from, to]) => isPlainName(from) && TEMPORARY.test(from) && isPlainName(to)) &&
      Array.isArray(removed) &&
      removed.every(isPlainName)
    return known ? { moves, removed } : undefined
  } catch {
    return undefined
  }
}

/** Does what a journal says, from wherever it was left off; others may be doing the same. */
function carryOut(folder: string, { moves, removed }: Journal): void {
  const at = (name: string) => join(folder, name)
  const move = ([from, to]: [string, string]) => {
    try {
      renameSync(at(from), at(to))
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error
    }
  }
  const left = moves.filter(([from]) => existsSync(at(from)))
  const isHead = ([, to]: [string, string]) => HEADS.includes(to)
  const heads = [
    ...left.filter(isHead).map(([, to]) => to),
    ...removed.filter((name) => HEADS.includes(name)),
  ]
  for (const name of heads) rmSync(at(name), { force: true })
  for (const each of left) if (!isHead(each)) move(each)
  for (const name of removed) rmSync(at(name), { force: true })
  for (const each of left) if (isHead(each)) move(each)
}

function removeJournal(folder: string, text: string): void {
  // another save may have begun
  if (readTextFile(join(folder, JOURNAL)) === text) rmSync(join(folder, JOURNAL), { force: true })
}

/** Finishes a save into the folder that was cut off when its files were written and not all in place. */
export function finishSave(folder: string): void {
  const path = join(folder, JOURNAL)
  if (!existsSync(path)) return
  const text = readTextFile(path)
  if (text === undefined) return // done by another process
  const journal = parseJournal(text)
  if (!journal) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_CHECKPOINT',
      `${path} is no journal of a save; remove it, and save the model again if it does not load`,
    )
  }
  try {
    carryOut(folder, journal)
    flushNow(folder)
    removeJournal(folder, text)
  } catch (cause) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_CHECKPOINT',
      `${folder}: a save into it was cut off and cannot be finished (${(cause as Error).message}). Open it once where ` +
        'it may be written, or save the model again',
      { cause },
    )
  }
}

// the names are on the disk once the folder is; not every file system can, and not every folder may be read

function flushNow(folder: string): void {
  try {
    const handle = openSync(folder, 'r')
    try {
      fsyncSync(handle)
    } finally {
      closeSync(handle)
    }
  } catch {
    // see above
  }
}

async function flush(folder: string): Promise<void> {
  const handle = await open(folder, 'r').catch(() => undefined)
  await handle?.sync().catch(() => {})
  await handle?.close()
}

// -- replacing

/** Files of a folder that are written beside their places and go there all together. */
export interface Replacement {
  /** Writes the file `name`, and flushes it to the disk; `fill` writes to the handle. */
  write(name: string, fill: (file: FileHandle) => Promise<void>): Promise<void>
  /** The file `name` goes, when the others are in place. */
  remove(name: string): void
}

/** The last replacement in each folder: there is one at a time. */
const turns = new Map<string, Promise<void>>()

/**
 * Replaces files of a folder. Until `fill` has returned, every one that was there is whole; when it throws, they stay as
 * they are and nothing else is left behind.
 */
export async function replaceFiles(
  folder: string,
  fill: (files: Replacement) => Promise<void>,
): Promise<void> {
  const key = await realpath(folder).catch(() => resolve(folder))
  const turn = (turns.get(key) ?? Promise.resolve()).then(() => replaceInTurn(folder, fill))
  const settled = turn.catch(() => {})
  turns.set(key, settled)
  try {
    await turn
  } finally {
    if (turns.get(key) === settled) turns.delete(key)
  }
}

async function replaceInTurn(folder: string, fill: (files: Replacement) => Promise<void>): Promise<void> {
  const written = new Map<string, string>()
  const removed: string[] = []
  const write = async (name: string, fillFile: (file: FileHandle) => Promise<void>) => {
    const temporary = temporaryName(name)
    try {
      const file = await open(join(folder, temporary), 'wx')
      written.set(name, temporary)
      try {
        await fillFile(file)
        await file.sync()
      } finally {
        await file.close()
      }
    } catch (cause) {
      throw writeError(join(folder, name), cause)
    }
  }
  try {
    if (existsSync(folder)) {
      finishSave(folder)
      removeAbandoned(folder)
    }
    await fill({ write, remove: (name) => void removed.push(name) })
    const gone = removed.filter((name) => existsSync(join(folder, name)))
    refuseFolders(folder, [...written.keys(), ...gone])
    if (written.size === 1 && gone.length === 0) {
      const [[name, temporary]] = [...written] as [[string, string]]
      await rename(join(folder, temporary), join(folder, name))
      written.clear()
      return await flush(folder)
    }
    const text = JSON.stringify({ moves: [...written].map(([name, from]) => [from, name]), removed: gone })
    await write(JOURNAL, (file) => file.writeFile(text))
    await flush(folder)
    await rename(join(folder, written.get(JOURNAL)!), join(folder, JOURNAL))
    written.clear()
    await flush(folder)
    await finishOwn(folder, text)
  } catch (error) {
    for (const temporary of written.values()) await rm(join(folder, temporary), { force: true })
    throw writeError(folder, error)
  }
}

/** A folder in the place of a file would stop the files half way. */
function refuseFolders(folder: string, names: readonly string[]): void {
  const name = names.find((each) => lstatSync(join(folder, each), { throwIfNoEntry: false })?.isDirectory())
  if (name === undefined) return
  throw new HalfbyteError(
    'ERR_HALFBYTE_IO',
    `${join(folder, name)} was not written: it is a folder. What was there before is untouched`,
  )
}

async function finishOwn(folder: string, text: string): Promise<void> {
  try {
    carryOut(folder, parseJournal(text)!)
    await flush(folder)
    removeJournal(folder, text)
  } catch (cause) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_IO',
      `${folder}: the new files are written, but not all are in place (${(cause as Error).message}); they will be when ` +
        'the folder is opened or saved to again',
      { cause },
    )
  }
}
