/** One safetensors file: its table of tensors, and tensors on a device on demand. */
import { statSync } from 'node:fs'
import { HalfbyteError } from '../errors.js'
import { native, type NativeFile } from '../native.js'
import { device as toDevice, type DeviceLike } from '../tensor/device.js'
import { DTYPES, type DType } from '../tensor/dtype.js'
import { rethrow } from '../tensor/rethrow.js'
import type { Shape } from '../tensor/shape.js'
import { Tensor } from '../tensor/tensor.js'
import { checkpointError, parseHeader, type Header, type TensorInfo } from './header.js'

/** Our dtypes by the names of the format. */
export const FROM_SAFETENSORS: Readonly<Record<string, DType>> = {
  F32: 'float32',
  F16: 'float16',
  BF16: 'bfloat16',
  I8: 'int8',
  U8: 'uint8',
  I32: 'int32',
  I64: 'int64',
}

export class SafetensorsFile implements Disposable {
  readonly path: string
  readonly size: number
  readonly metadata: Readonly<Record<string, string>>
  readonly tensors: ReadonlyMap<string, TensorInfo>
  readonly #file: NativeFile
  #closed = false

  private constructor(path: string, file: NativeFile, header: Header) {
    this.path = path
    this.size = file.size
    this.#file = file
    this.metadata = header.metadata
    this.tensors = header.tensors
  }

  /** Maps the file and checks its header. ERR_HALFBYTE_CHECKPOINT says what is wrong with it. */
  static open(path: string): SafetensorsFile {
    let stat
    try {
      stat = statSync(path)
    } catch (cause) {
      throw checkpointError(path, `cannot be opened (${(cause as NodeJS.ErrnoException).code})`, cause)
    }
    if (!stat.isFile()) throw checkpointError(path, 'is not a file')
    if (stat.size < 8) throw checkpointError(path, `${stat.size} bytes are too few for a safetensors file`)
    const file = rethrow(() => native.openFile(path))
    try {
      const read = (begin: number, end: number) => new Uint8Array(rethrow(() => file.bytes(begin, end)))
      return new SafetensorsFile(path, file, parseHeader(path, file.size, read))
    } catch (error) {
      file.close()
      throw error
    }
  }

  info(name: string): TensorInfo {
    const info = this.tensors.get(name)
    if (!info) throw checkpointError(this.path, `has no tensor ${JSON.stringify(name)}`)
    return info
  }

  /**
   * The tensor on a device, in the dtype that the file has. Its memory is taken when the work that touches `after` is
   * done; the file may be closed meanwhile.
   */
  tensor(name: string, on: DeviceLike, after?: Tensor): Tensor {
    const { shape, begin } = this.info(name)
    return this.#read(name, shape, begin, on, after)
  }

  /** Rows `begin` to `end` of its first dimension, likewise. */
  rows(name: string, begin: number, end: number, on: DeviceLike, after?: Tensor): Tensor {
    const info = this.info(name)
    const rowBytes = (info.end - info.begin) / info.shape[0]!
    return this.#read(name, info.shape.with(0, end - begin), info.begin + begin * rowBytes, on, after)
  }

  #read(name: string, shape: Shape, begin: number, on: DeviceLike, after: Tensor | undefined): Tensor {
    this.#checkOpen()
    const info = this.info(name)
    const dtype = FROM_SAFETENSORS[info.dtype]
    if (!dtype) {
      throw checkpointError(
        this.path,
        `tensor ${JSON.stringify(name)} is ${info.dtype}; halfbyte computes with ${Object.keys(FROM_SAFETENSORS).join(', ')}`,
      )
    }
    if (shape.length > 6) {
      throw checkpointError(
        this.path,
        `tensor ${JSON.stringify(name)} has ${shape.length} dimensions, the limit is 6`,
      )
    }
    const target = toDevice(on)
    const handle = rethrow(() =>
      this.#file.tensor(target.native, DTYPES[dtype].id, shape, begin, after?.handle),
    )
    return new Tensor(handle, target, dtype, shape)
  }

  /** The tensor's bytes, copied. */
  bytes(name: string): Uint8Array {
    this.#checkOpen()
    const { begin, end } = this.info(name)
    return new Uint8Array(rethrow(() => this.#file.bytes(begin, end)))
  }

  #checkOpen(): void {
    if (this.#closed) throw new HalfbyteError('ERR_HALFBYTE_DISPOSED', `${this.path}: the file was closed`)
  }

  close(): void {
    if (this.#closed) return
    this.#closed = true
    this.#file.close()
  }

  [Symbol.dispose](): void {
    this.close()
  }
}
