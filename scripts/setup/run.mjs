// Runs one step of the set-up in a child process and shows how far it is: on a terminal a line that is rewritten,
// elsewhere one line at the end. A step that takes less than a second leaves no trace.
import { spawn } from 'node:child_process'

/** What went wrong, for a user: printed without a stack trace. */
export class SetupError extends Error {}

const live = new Set()

/** Ends the steps that are running, with everything they started. */
export function stopChildren(signal) {
  for (const child of live) {
    try {
      process.kill(-child.pid, signal)
    } catch {
      child.kill(signal)
    }
  }
}

/** ninja says [3/40], make says [ 12%]. */
function fraction(line) {
  const steps = /^\[(\d+)\/(\d+)\]/.exec(line)
  if (steps) return Number(steps[1]) / Number(steps[2])
  const percent = /^\[\s*(\d+)%\]/.exec(line)
  return percent ? Number(percent[1]) / 100 : undefined
}

function bar(done) {
  const width = 24
  const filled = Math.round(done * width)
  return `[${'#'.repeat(filled)}${'.'.repeat(width - filled)}] ${String(Math.round(done * 100)).padStart(3)}%`
}

/** Resolves when the command ends with 0; rejects with a SetupError that holds the end of its output. */
export function run(title, command, args, options = {}) {
  const began = Date.now()
  const terminal = process.stderr.isTTY && !process.env.CI
  const seconds = () => (Date.now() - began) / 1000
  let output = ''
  let done
  const child = spawn(command, args, { ...options, stdio: ['ignore', 'pipe', 'pipe'], detached: true })
  live.add(child)
  const onData = (chunk) => {
    const text = chunk.toString()
    output = (output + text).slice(-20000)
    for (const line of text.split('\n')) done = fraction(line) ?? done
  }
  child.stdout.on('data', onData)
  child.stderr.on('data', onData)
  const timer = setInterval(() => {
    if (seconds() < 1 || !terminal) return
    const state = done === undefined ? '' : ` ${bar(done)}`
    process.stderr.write(`\r\x1b[2K${title}${state} ${seconds().toFixed(0)} s`)
  }, 200)

  return new Promise((resolve, reject) => {
    const finish = (error) => {
      clearInterval(timer)
      live.delete(child)
      if (terminal && seconds() >= 1) process.stderr.write('\r\x1b[2K')
      if (error) return reject(error)
      if (seconds() >= 1) process.stderr.write(`${title}: ${seconds().toFixed(1)} s\n`)
      resolve(output)
    }
    child.on('error', (cause) => finish(new SetupError(`${title}: cannot run ${command}: ${cause.message}`)))
    child.on('close', (code, signal) => {
      if (code === 0) return finish()
      finish(new SetupError(`${output.trimEnd()}\n\n${title} failed (${signal ?? `exit code ${code}`}).`))
    })
  })
}
