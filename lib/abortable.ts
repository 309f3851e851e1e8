/** Waiting that an AbortSignal ends. */

/** What is called when a signal is aborted: one listener for each signal, however many wait, or Node warns of a leak. */
const waiting = new WeakMap<AbortSignal, Set<() => void>>()

/** Calls `abort` when the signal is aborted, until the function that is returned has been called. */
function onAbort(signal: AbortSignal, abort: () => void): () => void {
  let calls = waiting.get(signal)
  if (!calls) {
    waiting.set(signal, (calls = new Set()))
    signal.addEventListener('abort', callAll)
  }
  calls.add(abort)
  return () => {
    calls.delete(abort)
    if (calls.size > 0 || waiting.get(signal) !== calls) return
    waiting.delete(signal)
    signal.removeEventListener('abort', callAll)
  }
}

function callAll(this: AbortSignal): void {
  for (const abort of waiting.get(this) ?? []) abort()
}

/** Settles like `promise`, or rejects with the signal's reason as soon as it is aborted. */
export function abortable<T>(promise: Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  if (!signal) return promise
  if (signal.aborted) {
    promise.catch(() => {})
    return Promise.reject(signal.reason as Error)
  }
  return new Promise((resolve, reject) => {
    const done = onAbort(signal, () => reject(signal.reason as Error))
    promise.then(resolve, reject).finally(done)
  })
}
