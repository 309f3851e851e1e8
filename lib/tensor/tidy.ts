import { HalfbyteError } from '../errors.js'
import type { MemoryView } from './memory_view.js'
import type { Tensor } from './tensor.js'

const scopes: Set<MemoryView>[] = []

/** @internal Called by every new tensor. */
export function track(tensor: MemoryView): void {
  scopes.at(-1)?.add(tensor)
}

/** @internal Takes the tensor out of every scope: it lives until it is disposed by name. */
export function keep<T extends Tensor>(tensor: T): T {
  for (const scope of scopes) scope.delete(tensor)
  return tensor
}

function* tensorsIn(value: unknown, depth = 0): Generator<Tensor> {
  if (typeof value !== 'object' || value === null || depth > 4) return
  if ('handle' in value && 'dtype' in value) yield value as Tensor
  else if (Array.isArray(value) || Object.getPrototypeOf(value) === Object.prototype) {
    for (const item of Object.values(value)) yield* tensorsIn(item, depth + 1)
  }
}

/** @internal What queues work must be synchronous: what an async function does later is not part of it any more. */
export function refusePromise(where: string, result: unknown): void {
  if (typeof (result as PromiseLike<unknown> | null | undefined)?.then !== 'function') return
  ;(result as PromiseLike<unknown>).then(undefined, () => {}) // it goes on, without what was taken from it
  throw new HalfbyteError(
    'ERR_HALFBYTE_USAGE',
    `${where}: the function must be synchronous; await what it needs before, and what it made after`,
  )
}

/**
 * Runs `fn` and disposes every tensor made in it but those it returns (alone, or in arrays and plain objects), which
 * pass to the scope outside. `fn` is synchronous: ops are queued, so nothing has to be awaited inside.
 */
export function tidy<T>(fn: () => T): T {
  const scope = new Set<MemoryView>()
  scopes.push(scope)
  try {
    const result = fn()
    refusePromise('tidy', result)
    for (const tensor of tensorsIn(result)) {
      if (scope.delete(tensor)) scopes.at(-2)?.add(tensor)
    }
    return result
  } finally {
    scopes.pop()
    for (const tensor of scope) tensor.dispose()
  }
}
