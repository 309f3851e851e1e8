/** Every error that the library raises: a stable `code`, and a message that says what, where and what to do. */

export type ErrorCode =
  | 'ERR_HALFBYTE_SHAPE'
  | 'ERR_HALFBYTE_DTYPE'
  | 'ERR_HALFBYTE_VALUE'
  | 'ERR_HALFBYTE_DEVICE'
  | 'ERR_HALFBYTE_DISPOSED'
  | 'ERR_HALFBYTE_OUT_OF_MEMORY'
  | 'ERR_HALFBYTE_UNSUPPORTED'
  | 'ERR_HALFBYTE_CUDA'
  | 'ERR_HALFBYTE_DRIVER'
  | 'ERR_HALFBYTE_DEVICE_LOST'
  | 'ERR_HALFBYTE_INTERNAL'
  | 'ERR_HALFBYTE_BINDING'
  | 'ERR_HALFBYTE_IO'
  | 'ERR_HALFBYTE_CONFIG'
  | 'ERR_HALFBYTE_CHECKPOINT'
  | 'ERR_HALFBYTE_STATE_DICT'
  | 'ERR_HALFBYTE_NO_LINEAR'
  | 'ERR_HALFBYTE_TOKENIZER'
  | 'ERR_HALFBYTE_USAGE'

export class HalfbyteError extends Error {
  override readonly name = 'HalfbyteError'
  readonly code: ErrorCode

  constructor(code: ErrorCode, message: string, options?: { cause?: unknown }) {
    super(message, options)
    this.code = code
  }
}
