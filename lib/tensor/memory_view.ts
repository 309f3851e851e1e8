/** Elements in the memory of a device: where they lie, what they are, and whether they are still there. */
import { inspect } from 'node:util'
import { HalfbyteError } from '../errors.js'
import type { NativeTensor } from '../native.js'
import type { Device } from './device.js'
import { DTYPES, type DType } from './dtype.js'
import { contiguousStrides, sizeOf, type Shape } from './shape.js'
import { track } from './tidy.js'
import { Writes } from './writes.js'

/** What Tensor is built on. */
export abstract class MemoryView implements Disposable {
  readonly shape: Shape
  readonly strides: readonly number[]
  /** First element, counted from the start of the storage. */
  readonly offset: number
  readonly dtype: DType
  readonly device: Device
  readonly #handle: NativeTensor
  readonly #writes: Writes
  #disposed = false

  /** @internal Use Tensor.from(), Tensor.empty(), ... or an op. */
  constructor(
    handle: NativeTensor,
    device: Device,
    dtype: DType,
    shape: Shape,
    strides?: readonly number[],
    offset = 0,
    of?: MemoryView,
  ) {
    this.#handle = handle
    this.#writes = of ? of.#writes : new Writes()
    this.device = device
    this.dtype = dtype
    this.shape = shape
    this.strides = strides ?? contiguousStrides(shape)
    this.offset = offset
    track(this)
  }

  /** @internal */
  get handle(): NativeTensor {
    this.checkAlive()
    return this.#handle
  }

  protected checkAlive(): void {
    if (!this.#disposed) return
    throw new HalfbyteError('ERR_HALFBYTE_DISPOSED', `This ${this.toString()} was disposed`)
  }

  get ndim(): number {
    return this.shape.length
  }

  /** Number of elements. */
  get size(): number {
    return sizeOf(this.shape)
  }

  get nbytes(): number {
    return this.size * DTYPES[this.dtype].bytes
  }

  get isContiguous(): boolean {
    const expected = contiguousStrides(this.shape)
    return this.shape.every((length, i) => length === 1 || this.strides[i] === expected[i])
  }

  /** The same number for tensors that share memory. */
  get storageId(): number {
    return this.handle.storageId
  }

  /** Bytes of the storage this is a view of. */
  get storageBytes(): number {
    return this.handle.storageBytes
  }

  get disposed(): boolean {
    return this.#disposed
  }

  toString(): string {
    return `Tensor(${this.dtype} [${this.shape.join(', ')}] on ${this.device.name})`
  }

  /** What console.log() shows. */
  [inspect.custom](): string {
    return this.toString()
  }

  /** @internal Changes when the memory is written to. */
  get version(): number {
    return this.#writes.count
  }

  /** @internal After something was queued that writes to the memory. */
  noteWrite(): void {
    this.#writes.add()
  }

  dispose(): void {
    if (this.#disposed) return
    this.#disposed = true
    this.#handle.dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }
}
