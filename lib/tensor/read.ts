/** Reading a tensor into main memory. */
import { HalfbyteError } from '../errors.js'
import { noGrad } from './autograd.js'
import { DTYPES, type TypedArray } from './dtype.js'
import { rethrowAsync } from './rethrow.js'
import type { Tensor } from './tensor.js'
import { tidy } from './tidy.js'

/** Bytes that come in one ArrayBuffer of the addon's: Node 20 makes none above 4 GiB. */
const PIECE = 2 ** 30

/** The elements of a contiguous tensor as they are when the work that is queued now has run. */
export async function readElements(source: Tensor, pieceBytes = PIECE): Promise<TypedArray> {
  const { array, bytes } = DTYPES[source.dtype]
  const { native } = source.device
  if (source.nbytes <= pieceBytes) return new array(await rethrowAsync(native.read(source.handle)))
  const each = Math.floor(pieceBytes / bytes)
  const count = Math.ceil(source.size / each)
  const whole = allocate(source)
  // all of them are queued before anybody can write to the tensor
  const pieces = noGrad(() =>
    tidy(() => {
      const flat = source.reshape(source.size)
      return Array.from({ length: count }, (_, i) =>
        native.read(flat.slice(0, i * each, Math.min(flat.size, (i + 1) * each)).handle),
      )
    }),
  )
  for (const piece of pieces) piece.catch(() => {}) // the first failure is the one that counts
  for (let i = 0; i < count; i++) {
    const piece = await rethrowAsync(pieces[i]!)
    // each kind of array takes its own kind
    ;(whole as Uint8Array).set(new array(piece) as Uint8Array, i * each)
  }
  return whole
}

function allocate(source: Tensor): TypedArray {
  const { array, bytes } = DTYPES[source.dtype]
  try {
    return new array(new ArrayBuffer(source.size * bytes))
  } catch (cause) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_OUT_OF_MEMORY',
      `data: Node has no array for the ${source.nbytes} bytes of ${source.toString()} (${(cause as Error).message}); read it slice by slice`,
      { cause },
    )
  }
}
