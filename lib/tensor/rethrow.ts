import { HalfbyteError, type ErrorCode } from '../errors.js'

/** An error of the addon as one of ours; others as they are. */
export function convertError(error: unknown): unknown {
  if (error instanceof HalfbyteError) return error
  const { code, message } = (error ?? {}) as { code?: unknown; message?: unknown }
  if (typeof code === 'string' && code.startsWith('ERR_HALFBYTE_')) {
    return new HalfbyteError(code as ErrorCode, String(message))
  }
  return error
}

/** Errors made by the addon carry a code but are not of our class (nor, in jest, of this realm's Error). */
export function rethrow<T>(fn: () => T): T {
  try {
    return fn()
  } catch (error) {
    throw convertError(error)
  }
}

export async function rethrowAsync<T>(promise: Promise<T>): Promise<T> {
  try {
    return await promise
  } catch (error) {
    throw convertError(error)
  }
}
