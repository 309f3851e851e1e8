import { markAsUntransferable } from 'node:worker_threads'
import { HalfbyteError } from '../errors.js'
import type { NativeTensor } from '../native.js'
import { defaultDevice, device as toDevice, type Device, type DeviceLike } from './device.js'
import { checkDType, DTYPES, isArrayOf, type DType, type TypedArray } from './dtype.js'
import { rethrow, rethrowAsync } from './rethrow.js'
import { track } from './tidy.js'
import { copyInto, fillInto } from './ops/layout.js'

export type Shape = readonly number[]
export type Nested = number | boolean | readonly Nested[]

export interface TensorOptions {
  dtype?: DType
  device?: DeviceLike
  shape?: Shape
  /**
   * false: use the typed array's own memory where the device can (the CPU). Do not change it while work is queued, and
   * do not transfer() its buffer while the tensor lives.
   */
  copy?: boolean
}

export function sizeOf(shape: Shape): number {
  return shape.reduce((product, length) => product * length, 1)
}

export function contiguousStrides(shape: Shape): number[] {
  const strides = new Array<number>(shape.length)
  let stride = 1
  for (let i = shape.length - 1; i >= 0; i--) {
    strides[i] = stride
    stride *= shape[i]!
  }
  return strides
}

function checkShape(shape: Shape, where: string): void {
  const bad = shape.find((n) => !Number.isSafeInteger(n) || n < 0)
  if (bad !== undefined || shape.length > 6 || !Number.isSafeInteger(sizeOf(shape) * 8)) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_SHAPE',
      `${where}: [${shape.join(', ')}] is not a shape (at most 6 dimensions, whole numbers >= 0)`,
    )
  }
}

/**
 * A view (offset, shape, strides) on memory of one device. Ops queue work and return at once; `data()` waits for the
 * values. `dispose()` (or `using`, or `tidy()`) frees the memory when no other view and no queued op needs it; the
 * garbage collector does so in the end, when V8 gets round to it.
 */
export class Tensor implements Disposable {
  readonly shape: Shape
  readonly strides: readonly number[]
  /** First element, counted from the start of the storage. */
  readonly offset: number
  readonly dtype: DType
  readonly device: Device
  readonly #handle: NativeTensor
  #disposed = false

  /** @internal Use Tensor.from(), Tensor.empty(), ... or an op. */
  constructor(
    handle: NativeTensor,
    device: Device,
    dtype: DType,
    shape: Shape,
    strides?: readonly number[],
    offset = 0,
  ) {
    this.#handle = handle
    this.device = device
    this.dtype = dtype
    this.shape = shape
    this.strides = strides ?? contiguousStrides(shape)
    this.offset = offset
    track(this)
  }

  // -- making tensors

  /** Undefined content. */
  static empty(shape: Shape, dtype: DType = 'float32', on: DeviceLike = defaultDevice()): Tensor {
    checkShape(shape, 'Tensor.empty')
    const target = toDevice(on)
    const { id } = DTYPES[checkDType(dtype, 'Tensor.empty')]
    return new Tensor(
      rethrow(() => target.native.empty(id, shape)),
      target,
      dtype,
      [...shape],
    )
  }

  static full(
    shape: Shape,
    value: number,
    dtype: DType = 'float32',
    on: DeviceLike = defaultDevice(),
  ): Tensor {
    return fillInto(Tensor.empty(shape, dtype, on), value)
  }

  static zeros(shape: Shape, dtype: DType = 'float32', on: DeviceLike = defaultDevice()): Tensor {
    return Tensor.full(shape, 0, dtype, on)
  }

  /**
   * From a typed array (its dtype: Float32Array float32, Int8Array int8, Uint8Array uint8, Int32Array int32,
   * BigInt64Array int64; Uint16Array needs dtype float16 or bfloat16), or from numbers, nested to give the shape.
   */
  static from(data: TypedArray | Nested, options: TensorOptions = {}): Tensor {
    const target = toDevice(options.device ?? defaultDevice())
    if (!ArrayBuffer.isView(data)) return fromNested(data, options, target)
    const dtype = options.dtype ?? dtypeOf(data)
    const info = DTYPES[checkDType(dtype, 'Tensor.from')]
    if (!isArrayOf(dtype, data)) {
      throw new HalfbyteError(
        'ERR_HALFBYTE_DTYPE',
        `Tensor.from: ${dtype} is read from a ${info.array.name}, not from a ${(data as object).constructor.name}`,
      )
    }
    const shape = [...(options.shape ?? [data.length])]
    checkShape(shape, 'Tensor.from')
    if (sizeOf(shape) !== data.length) {
      throw new HalfbyteError(
        'ERR_HALFBYTE_SHAPE',
        `Tensor.from: shape [${shape.join(', ')}] has ${sizeOf(shape)} elements, the array ${data.length}`,
      )
    }
    const copy = options.copy ?? true
    // Memory that is in use must not move to another thread.
    if (!copy) markAsUntransferable(data.buffer)
    return new Tensor(
      rethrow(() => target.native.fromHost(info.id, shape, data, copy)),
      target,
      dtype,
      shape,
    )
  }

  // -- facts

  /** @internal */
  get handle(): NativeTensor {
    if (this.#disposed) {
      throw new HalfbyteError('ERR_HALFBYTE_DISPOSED', `This ${this.toString()} was disposed`)
    }
    return this.#handle
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

  // -- reading

  /** The elements in row-major order, once computed. 16-bit floats come as raw bits; see `floats()`. */
  async data(): Promise<TypedArray> {
    const source = this.contiguous()
    try {
      const buffer = await rethrowAsync(this.device.native.read(source.handle))
      return new DTYPES[this.dtype].array(buffer)
    } finally {
      if (source !== this) source.dispose()
    }
  }

  /** The elements as float32, converted from any dtype. */
  async floats(): Promise<Float32Array> {
    if (this.dtype === 'float32') return (await this.data()) as Float32Array
    const converted = this.to('float32')
    try {
      return (await converted.data()) as Float32Array
    } finally {
      converted.dispose()
    }
  }

  /** The only element, as a number. */
  async item(): Promise<number> {
    if (this.size !== 1) {
      throw new HalfbyteError(
        'ERR_HALFBYTE_SHAPE',
        `item: ${this.toString()} has ${this.size} elements, not 1`,
      )
    }
    if (this.dtype === 'float16' || this.dtype === 'bfloat16') return (await this.floats())[0]!
    return Number((await this.data())[0]!)
  }

  // -- views: same memory, no work

  #view(shape: Shape, strides: readonly number[], start: number): Tensor {
    // an empty view may begin at the very end of the memory, which is no element's place
    const offset = sizeOf(shape) === 0 ? 0 : start
    const handle = rethrow(() => this.handle.view(DTYPES[this.dtype].id, shape, strides, offset))
    return new Tensor(handle, this.device, this.dtype, shape, strides, offset)
  }

  /** Another shape of as many elements; one length may be -1. A view where the memory allows it, else a copy. */
  reshape(...lengths: number[]): Tensor {
    const known = lengths.filter((n) => n !== -1).reduce((product, n) => product * n, 1)
    const shape = lengths.map((n) => (n === -1 ? (known === 0 ? 0 : this.size / known) : n))
    checkShape(shape, `reshape of ${this.toString()} to [${lengths.join(', ')}]`)
    if (sizeOf(shape) !== this.size || lengths.filter((n) => n === -1).length > 1) {
      throw new HalfbyteError(
        'ERR_HALFBYTE_SHAPE',
        `reshape: ${this.toString()} does not have the elements of [${lengths.join(', ')}]`,
      )
    }
    if (this.isContiguous) return this.#view(shape, contiguousStrides(shape), this.offset)
    const copy = this.contiguous()
    try {
      return copy.#view(shape, contiguousStrides(shape), 0)
    } finally {
      copy.dispose()
    }
  }

  /** Elements begin .. end-1 of dimension `dim` (negative dims count from the last). */
  slice(dim: number, begin: number, end: number): Tensor {
    const d = this.#dim(dim)
    const length = this.shape[d]!
    if (!Number.isInteger(begin) || !Number.isInteger(end) || begin < 0 || end < begin || end > length) {
      throw new HalfbyteError(
        'ERR_HALFBYTE_SHAPE',
        `slice: ${begin} .. ${end} is not within dimension ${d} of ${this.toString()}`,
      )
    }
    const shape = this.shape.with(d, end - begin)
    return this.#view(shape, this.strides, this.offset + begin * this.strides[d]!)
  }

  /** The dimensions in another order. */
  permute(...order: number[]): Tensor {
    const dims = order.map((dim) => this.#dim(dim))
    if (new Set(dims).size !== this.ndim || dims.length !== this.ndim) {
      throw new HalfbyteError(
        'ERR_HALFBYTE_SHAPE',
        `permute: [${order.join(', ')}] does not order ${this.toString()}`,
      )
    }
    return this.#view(
      dims.map((d) => this.shape[d]!),
      dims.map((d) => this.strides[d]!),
      this.offset,
    )
  }

  transpose(a: number, b: number): Tensor {
    const order = this.shape.map((_, i) => i)
    ;[order[this.#dim(a)], order[this.#dim(b)]] = [this.#dim(b), this.#dim(a)]
    return this.permute(...order)
  }

  /** Repeats dimensions of length 1, and new leading ones, without copying. */
  expand(...shape: number[]): Tensor {
    const lead = shape.length - this.ndim
    const strides = shape.map((length, i) => {
      const own = this.shape[i - lead]
      if (i < lead || (own === 1 && length !== 1)) return 0
      if (own === length) return this.strides[i - lead]!
      throw new HalfbyteError(
        'ERR_HALFBYTE_SHAPE',
        `expand: ${this.toString()} does not expand to [${shape.join(', ')}]`,
      )
    })
    if (lead < 0) {
      throw new HalfbyteError(
        'ERR_HALFBYTE_SHAPE',
        `expand: ${this.toString()} does not expand to [${shape.join(', ')}]`,
      )
    }
    return this.#view(shape, strides, this.offset)
  }

  /** A second tensor on the same memory, with a life of its own. */
  share(): Tensor {
    return this.#view(this.shape, this.strides, this.offset)
  }

  /**
   * The same bits as another dtype. Between dtypes of different size the tensor must be contiguous, and its last
   * dimension, in bytes, a whole number of elements.
   */
  bitcast(dtype: DType): Tensor {
    const { id, bytes } = DTYPES[checkDType(dtype, 'bitcast')]
    const own = DTYPES[this.dtype].bytes
    const make = (shape: Shape, strides: readonly number[], offset: number) => {
      const handle = rethrow(() => this.handle.view(id, shape, strides, offset))
      return new Tensor(handle, this.device, dtype, shape, strides, offset)
    }
    if (bytes === own) return make(this.shape, this.strides, this.offset)
    const last = ((this.shape.at(-1) ?? 1) * own) / bytes
    const offset = (this.offset * own) / bytes
    if (!this.isContiguous || this.ndim === 0 || !Number.isInteger(last) || !Number.isInteger(offset)) {
      throw new HalfbyteError(
        'ERR_HALFBYTE_DTYPE',
        `bitcast: ${this.toString()} does not divide into elements of ${dtype}`,
      )
    }
    const shape = this.shape.with(-1, last)
    return make(shape, contiguousStrides(shape), offset)
  }

  #dim(dim: number): number {
    const d = dim < 0 ? dim + this.ndim : dim
    if (!Number.isInteger(d) || d < 0 || d >= this.ndim) {
      throw new HalfbyteError('ERR_HALFBYTE_SHAPE', `${this.toString()} has no dimension ${dim}`)
    }
    return d
  }

  // -- copies

  /** This tensor when its elements are contiguous, else a copy that is. */
  contiguous(): Tensor {
    return this.isContiguous ? this : this.clone()
  }

  clone(): Tensor {
    return copyInto(Tensor.empty(this.shape, this.dtype, this.device), this)
  }

  /** Overwrites this tensor's elements with another's of the same shape, converted. Both on one device. */
  copyFrom(source: Tensor): this {
    copyInto(this, source)
    return this
  }

  /** Overwrites this contiguous tensor with host data, in queue order. */
  write(data: TypedArray): this {
    if (!isArrayOf(this.dtype, data) || data.length !== this.size || !this.isContiguous) {
      throw new HalfbyteError(
        'ERR_HALFBYTE_SHAPE',
        `write: a contiguous ${this.toString()} takes a ${DTYPES[this.dtype].array.name} of ${this.size}`,
      )
    }
    rethrow(() => this.device.native.write(this.handle, data))
    return this
  }

  /** With another dtype, on another device, or both. Itself when nothing changes (so do not dispose it blindly). */
  to(target: DType | DeviceLike | { dtype?: DType; device?: DeviceLike }): Tensor {
    const wanted =
      typeof target === 'string' && Object.hasOwn(DTYPES, target)
        ? { dtype: target as DType }
        : typeof target === 'string' || 'native' in target
          ? { device: target }
          : target
    const dtype = checkDType(wanted.dtype ?? this.dtype, 'to')
    const on = toDevice(wanted.device ?? this.device)
    let result: Tensor = this
    if (dtype !== this.dtype) result = copyInto(Tensor.empty(this.shape, dtype, this.device), this)
    if (on === this.device) return result
    const source = result.contiguous()
    const moved = new Tensor(
      rethrow(() => on.native.copyFrom(source.handle)),
      on,
      dtype,
      this.shape,
    )
    if (source !== result) source.dispose()
    if (result !== this) result.dispose()
    return moved
  }

  // -- life

  dispose(): void {
    if (this.#disposed) return
    this.#disposed = true
    this.#handle.dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }
}

function dtypeOf(data: ArrayBufferView): DType {
  if (isArrayOf('float16', data)) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_DTYPE',
      'Tensor.from: a Uint16Array needs dtype float16 or bfloat16',
    )
  }
  for (const name of Object.keys(DTYPES) as DType[]) if (isArrayOf(name, data)) return name
  throw new HalfbyteError(
    'ERR_HALFBYTE_DTYPE',
    `Tensor.from: cannot read a ${(data as object).constructor.name}`,
  )
}

function fromNested(data: Nested, options: TensorOptions, target: Device): Tensor {
  const shape: number[] = []
  for (let level: Nested = data; Array.isArray(level); level = level[0] as Nested) {
    shape.push(level.length)
    if (level.length === 0) break
  }
  const flat = (Array.isArray(data) ? data.flat(Infinity) : [data]) as number[]
  if (flat.length !== sizeOf(shape) || flat.some((x) => typeof x !== 'number' && typeof x !== 'boolean')) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_SHAPE',
      'Tensor.from: the nested arrays are ragged or hold other than numbers',
    )
  }
  const dtype = options.dtype ?? 'float32'
  const final = options.shape ?? shape
  if (dtype === 'int64') {
    const integers = BigInt64Array.from(flat, (x) => BigInt(Math.trunc(Number(x))))
    return Tensor.from(integers, { dtype, shape: final, device: target })
  }
  if (dtype === 'float32' || dtype === 'float16' || dtype === 'bfloat16') {
    const single = Tensor.from(Float32Array.from(flat, Number), { shape: final, device: target })
    if (dtype === 'float32') return single
    const converted = single.to(dtype)
    single.dispose()
    return converted
  }
  const array = { int8: Int8Array, uint8: Uint8Array, int32: Int32Array }[dtype]
  if (!array) checkDType(dtype, 'Tensor.from')
  return Tensor.from(new array(flat.map(Number)), { shape: final, device: target })
}
