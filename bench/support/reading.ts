/** The rate at which files can be read by plain means: worker threads, each with stripes of the files. */
import { readdirSync, statSync } from 'node:fs'
import { join } from 'node:path'
import { Worker } from 'node:worker_threads'

const PIECE = 4 << 20

/** Reads its share of the files at the word 'go', then says so. */
const READER = `
const { openSync, readSync, closeSync, fstatSync } = require('node:fs')
const { parentPort, workerData } = require('node:worker_threads')
const { files, piece, index, count } = workerData
const buffer = Buffer.alloc(piece)
parentPort.on('message', () => {
  for (const path of files) {
    const file = openSync(path, 'r')
    const { size } = fstatSync(file)
    for (let at = index * piece; at < size; at += count * piece) readSync(file, buffer, 0, Math.min(piece, size - at), at)
    closeSync(file)
  }
  parentPort.postMessage('done')
})
parentPort.postMessage('ready')
`

export function weightFiles(folder: string): string[] {
  return readdirSync(folder)
    .filter((name) => name.endsWith('.safetensors'))
    .map((name) => join(folder, name))
}

export function bytesIn(files: readonly string[]): number {
  return files.reduce((sum, path) => sum + statSync(path).size, 0)
}

/** Seconds that `count` threads together take to read every file once. */
export async function secondsToRead(files: readonly string[], count: number): Promise<number> {
  const workers = Array.from(
    { length: count },
    (_, index) => new Worker(READER, { eval: true, workerData: { files, piece: PIECE, index, count } }),
  )
  const all = () =>
    Promise.all(
      workers.map(
        (worker) =>
          new Promise<void>((resolve, reject) => {
            worker.once('message', () => resolve())
            worker.once('error', reject)
          }),
      ),
    )
  await all()
  const began = performance.now()
  const done = all()
  for (const worker of workers) worker.postMessage('go')
  await done
  const seconds = (performance.now() - began) / 1e3
  await Promise.all(workers.map((worker) => worker.terminate()))
  return seconds
}
