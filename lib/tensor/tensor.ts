import { markAsUntransferable } from 'node:worker_threads'
import { HalfbyteError } from '../errors.js'
import { needsGrad, noGrad, record, withoutGradient, type GradNode } from './autograd.js'
import { backward, checkAlike } from './backward.js'
import { defaultDevice, device as toDevice, type Device, type DeviceLike } from './device.js'
import { checkDType, DTYPES, isArrayOf, type DType, type TypedArray } from './dtype.js'
import { readArray, readNested, type Nested } from './host_data.js'
import { MemoryView } from './memory_view.js'
import { copyInto, fillInto } from './ops/layout.js'
import { sumTo } from './ops/reduce.js'
import { readElements } from './read.js'
import { rethrow } from './rethrow.js'
import { checkLengths, contiguousStrides, sizeOf, type Shape } from './shape.js'
import { readTarget, type MoveTarget } from './target.js'
import { keep } from './tidy.js'
import { bitcastTo, dimensionOf, expanded, permuted, reshapedTo, sliced, type Place } from './views.js'

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

/**
 * A view (offset, shape, strides) on memory of one device. Ops queue work and return at once; `data()` waits for the
 * values. `dispose()` (or `using`, or `tidy()`) frees the memory when no other view and no queued op needs it; the
 * garbage collector does so in the end, when V8 gets round to it.
 */
export class Tensor extends MemoryView {
  #isLeaf = false
  #node: GradNode | undefined
  #grad: Tensor | undefined

  // -- making tensors

  /** Undefined content. */
  static empty(shape: Shape, dtype: DType = 'float32', on: DeviceLike = defaultDevice()): Tensor {
    checkLengths(shape, 'Tensor.empty')
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
    if (!ArrayBuffer.isView(data)) return Tensor.#fromNested(data, options, target)
    const { dtype, shape } = readArray(data, options)
    const copy = options.copy ?? true
    // Memory that is in use must not move to another thread.
    if (!copy) markAsUntransferable(data.buffer)
    return new Tensor(
      rethrow(() => target.native.fromHost(DTYPES[dtype].id, shape, data, copy)),
      target,
      dtype,
      shape,
    )
  }

  static #fromNested(data: Nested, options: TensorOptions, target: Device): Tensor {
    const dtype = options.dtype ?? 'float32'
    const { array, shape } = readNested(data, dtype)
    const made = Tensor.from(array, { shape: options.shape ?? shape, device: target })
    const converted = made.to(dtype)
    if (converted !== made) made.dispose()
    return converted
  }

  // -- reading

  /** The elements in row-major order, once computed. 16-bit floats come as raw bits; see `floats()`. */
  async data(): Promise<TypedArray> {
    const source = noGrad(() => this.contiguous())
    try {
      return await readElements(source)
    } finally {
      if (source !== this) source.dispose()
    }
  }

  /** The elements as float32, converted from any dtype. */
  async floats(): Promise<Float32Array> {
    if (this.dtype === 'float32') return (await this.data()) as Float32Array
    const converted = noGrad(() => this.to('float32'))
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

  #view({ shape, strides, offset }: Place, dtype = this.dtype): Tensor {
    // an empty view may begin at the very end of the memory, which is no element's place
    const start = sizeOf(shape) === 0 ? 0 : offset
    const handle = rethrow(() => this.handle.view(DTYPES[dtype].id, shape, strides, start))
    return new Tensor(handle, this.device, dtype, shape, strides, start, this)
  }

  /** What `make` gives of this tensor, with the way back to it. */
  #derive(op: string, make: () => Tensor, by: (dy: Tensor) => Tensor): Tensor {
    return needsGrad(this) ? record(op, make, [{ of: this, by }]) : make()
  }

  /** Another shape of as many elements; one length may be -1. A view where the memory allows it, else a copy. */
  reshape(...lengths: number[]): Tensor {
    const shape = reshapedTo(this, lengths)
    const own = this.shape
    return this.#derive(
      'reshape',
      () => this.#reshaped(shape),
      (dy) => dy.reshape(...own),
    )
  }

  #reshaped(shape: Shape): Tensor {
    const strides = contiguousStrides(shape)
    if (this.isContiguous) return this.#view({ shape, strides, offset: this.offset })
    const copy = this.contiguous()
    try {
      return copy.#view({ shape, strides, offset: 0 })
    } finally {
      copy.dispose()
    }
  }

  /** Elements begin .. end-1 of dimension `dim` (negative dims count from the last). */
  slice(dim: number, begin: number, end: number): Tensor {
    const d = dimensionOf(this, dim)
    const place = sliced(this, d, begin, end)
    const make = () => this.#view(place)
    if (!needsGrad(this)) return make()
    const whole = this.shape
    // many slices of one tensor add to one gradient
    const part = { shape: whole, of: (gradient: Tensor) => gradient.slice(d, begin, end) }
    return record('slice', make, [{ of: this, by: (dy) => dy, part }])
  }

  /** The dimensions in another order. */
  permute(...order: number[]): Tensor {
    const place = permuted(this, order)
    const { dims } = place
    const back = dims.map((_, d) => dims.indexOf(d))
    return this.#derive(
      'permute',
      () => this.#view(place),
      (dy) => dy.permute(...back),
    )
  }

  transpose(a: number, b: number): Tensor {
    const order = this.shape.map((_, i) => i)
    const [first, second] = [dimensionOf(this, a), dimensionOf(this, b)]
    ;[order[first], order[second]] = [second, first]
    return this.permute(...order)
  }

  /** Repeats dimensions of length 1, and new leading ones, without copying. */
  expand(...shape: number[]): Tensor {
    const place = expanded(this, shape)
    const own = this.shape
    return this.#derive(
      'expand',
      () => this.#view(place),
      (dy) => sumTo(dy, own),
    )
  }

  /** A second tensor on the same memory, with a life of its own. Gradients pass through it. */
  share(): Tensor {
    return this.#derive(
      'share',
      () => this.#view(this),
      (dy) => dy,
    )
  }

  /** A second tensor on the same memory that gradients do not pass through. */
  detach(): Tensor {
    return this.#view(this)
  }

  /**
   * The same bits as another dtype. Between dtypes of different size the tensor must be contiguous, and its last
   * dimension, in bytes, a whole number of elements.
   */
  bitcast(dtype: DType): Tensor {
    checkDType(dtype, 'bitcast')
    if (needsGrad(this)) throw withoutGradient('bitcast', this)
    return this.#view(bitcastTo(this, dtype), dtype)
  }

  // -- copies

  /** This tensor when its elements are contiguous, else a copy that is. */
  contiguous(): Tensor {
    return this.isContiguous ? this : this.clone()
  }

  clone(): Tensor {
    return this.#derive(
      'clone',
      () => copyInto(Tensor.empty(this.shape, this.dtype, this.device), this),
      (dy) => dy,
    )
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
    this.checkWritable('write')
    rethrow(() => this.device.native.write(this.handle, data))
    this.noteWrite()
    return this
  }

  /** With another dtype, on another device, or both. Itself when nothing changes (so do not dispose it blindly). */
  to(target: MoveTarget): Tensor {
    const { dtype = this.dtype, device: on = this.device } = readTarget(target)
    if (dtype === this.dtype && on === this.device) return this
    const own = { dtype: this.dtype, device: this.device }
    const make = () => this.#converted(dtype, on)
    return DTYPES[dtype].isFloat ? this.#derive('to', make, (dy) => dy.to(own)) : noGrad(make)
  }

  #converted(dtype: DType, on: Device): Tensor {
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

  // -- gradients

  /**
   * Whether backward() computes a gradient for this tensor. Set it on float tensors that are to be learnt; results of ops
   * on them have it by themselves.
   */
  get requiresGrad(): boolean {
    return this.#isLeaf || this.#node !== undefined
  }

  set requiresGrad(wanted: boolean) {
    if (typeof wanted !== 'boolean') {
      throw new HalfbyteError(
        'ERR_HALFBYTE_VALUE',
        `requiresGrad: ${String(wanted)} is neither true nor false`,
      )
    }
    if (wanted === this.requiresGrad) return
    if (this.#node) {
      throw new HalfbyteError(
        'ERR_HALFBYTE_USAGE',
        `requiresGrad: ${this.toString()} is the result of ${this.#node.op}; detach() gives one without gradient`,
      )
    }
    if (!DTYPES[this.dtype].isFloat) {
      throw new HalfbyteError(
        'ERR_HALFBYTE_DTYPE',
        `requiresGrad: ${this.toString()} is not of a float dtype, and has no gradient`,
      )
    }
    this.#isLeaf = wanted
  }

  /** Whether it is the result of no op that gradients go back through: backward() fills the `grad` of leaves alone. */
  get isLeaf(): boolean {
    return this.#node === undefined
  }

  /**
   * The sum of the gradients of every backward() since zeroGrad(), in this tensor's shape and dtype; undefined before the
   * first, and for results of ops. This tensor owns it, and what is assigned: the next backward() may put another tensor
   * in its place and dispose it.
   */
  get grad(): Tensor | undefined {
    return this.#grad?.disposed ? undefined : this.#grad
  }

  set grad(gradient: Tensor | undefined) {
    if (gradient === this.#grad) return
    if (gradient) checkAlike('grad', gradient, this)
    this.#grad?.dispose()
    this.#grad = gradient && keep(gradient)
  }

  /** Frees the gradient. */
  zeroGrad(): void {
    this.grad = undefined
  }

  /**
   * Adds the gradient of this tensor to `grad` of every tensor that it was computed from and that requires one. Of one
   * element it needs no `gradient` (1); else one of its shape, dtype and device. What the ops had kept for it is freed,
   * unless `retainGraph`.
   */
  backward(gradient?: Tensor, options: { retainGraph?: boolean } = {}): void {
    this.checkAlive()
    backward(this, gradient, options.retainGraph ?? false)
  }

  /** @internal The op that it is the result of, when gradients go back through it. */
  get gradNode(): GradNode | undefined {
    return this.#node
  }

  set gradNode(node: GradNode | undefined) {
    this.#node = node
  }

  /** @internal Before something is queued that writes to the memory; noteWrite() comes after it. */
  checkWritable(op: string): void {
    if (!needsGrad(this)) return
    throw new HalfbyteError(
      'ERR_HALFBYTE_USAGE',
      `${op}: would write over ${this.toString()}, which requires a gradient; do it in noGrad()`,
    )
  }

  // -- life

  override dispose(): void {
    if (this.disposed) return
    super.dispose()
    this.#node?.release()
    this.zeroGrad()
  }
}
