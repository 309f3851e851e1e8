import { HalfbyteError } from '../../lib/errors'

/** The HalfbyteError that `fn` throws; fails the test when it throws another or none. */
export function thrown(fn: () => unknown): HalfbyteError {
  try {
    fn()
  } catch (error) {
    expect(error).toBeInstanceOf(HalfbyteError)
    return error as HalfbyteError
  }
  throw new Error('nothing was thrown')
}

/** The HalfbyteError that the promise rejects with. */
export async function rejection(promise: Promise<unknown>): Promise<HalfbyteError> {
  const error = await promise.then(
    () => new Error('the promise was fulfilled'),
    (reason: unknown) => reason,
  )
  expect(error).toBeInstanceOf(HalfbyteError)
  return error as HalfbyteError
}
