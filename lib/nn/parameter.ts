/**
 * A named place for a tensor in a module. It has a shape from the start and a value from the moment that it is
 * initialised or loaded, so that a model can be built on no memory at all and filled tensor by tensor.
 */
import { inspect } from 'node:util'
import { HalfbyteError } from '../errors.js'
import { noGrad } from '../tensor/autograd.js'
import { device as toDevice, type Device, type DeviceLike } from '../tensor/device.js'
import { checkDType, DTYPES, type DType } from '../tensor/dtype.js'
import { checkLengths, sizeOf, type Shape } from '../tensor/shape.js'
import type { Tensor } from '../tensor/tensor.js'
import { keep } from '../tensor/tidy.js'
import { firstValues, type Init } from './init.js'
import { entryOf, onDiskError, type StateEntry } from './state_dict.js'

/** Where a module's tensors go: a device, or 'meta' for shapes without memory, to be loaded later. */
export type Placement = DeviceLike | 'meta'

export interface ParameterOptions {
  /** Loaded tensors are converted to it. Unset on 'meta': the dtype that arrives. Else float32. */
  dtype?: DType | undefined
  device?: Placement | undefined
  /** The first value, row-major; without it the parameter starts unloaded. */
  init?: Init | undefined
  /** Elements that it stands for, where that is not the size of its tensor (packed weights). */
  numel?: number | undefined
}

/** Where the value of an offloaded parameter comes from. */
export interface ParameterSource {
  /** As its module computes with it. */
  bringIn(): Tensor
  /** On another device, for whoever asks. */
  read(on: Device): Tensor
}

interface MetaScope {
  dtype?: DType | undefined
  device?: DeviceLike | undefined
}

const scopes: MetaScope[] = []

/**
 * Runs `build` with every module in it made without memory. `dtype` and `device` say what its parameters will have
 * once they are loaded; left out, they take those of the tensors that arrive.
 */
export function onMeta<T>(build: () => T, options: MetaScope = {}): T {
  scopes.push(options)
  try {
    return build()
  } finally {
    scopes.pop()
  }
}

/** What options and the surrounding onMeta() come to: `meta` is whether a module starts without memory. */
export function place(options: { dtype?: DType | undefined; device?: Placement | undefined }): {
  meta: boolean
  dtype: DType | undefined
  device: Device | undefined
} {
  const scope = scopes.at(-1)
  const dtype = options.dtype ?? scope?.dtype
  const on = options.device === 'meta' ? scope?.device : (options.device ?? scope?.device)
  return {
    meta: options.device === 'meta' || (options.device === undefined && scope !== undefined),
    dtype: dtype === undefined ? undefined : checkDType(dtype, 'Parameter'),
    device: on === undefined ? undefined : toDevice(on),
  }
}

/** The tensor, or what an op has made without the way back: what is learnt is the parameter. */
function asLeaf(tensor: Tensor): Tensor {
  if (tensor.isLeaf) return tensor
  const leaf = tensor.detach()
  tensor.dispose()
  return leaf
}

export class Parameter implements Disposable {
  readonly shape: Shape
  readonly numel: number
  readonly kind: 'parameter' | 'buffer' = 'parameter'
  /** False: not part of the state dict. */
  readonly persistent: boolean = true
  /** Its full name in the model, once known; for messages. */
  path = ''
  #dtype: DType | undefined
  #device: Device | undefined
  #value: Tensor | undefined
  /** Makes the value anew whenever it is needed. */
  #source: ParameterSource | undefined
  #disposed = false
  #requiresGrad = false
  #refusal: string | undefined

  constructor(shape: Shape, options: ParameterOptions = {}) {
    checkLengths(shape, 'Parameter')
    this.shape = [...shape]
    this.numel = options.numel ?? sizeOf(shape)
    const { meta, dtype, device } = place(options)
    this.#dtype = dtype
    this.#device = device
    if (meta || !options.init) return
    this.#dtype ??= 'float32'
    const first = firstValues(options.init, this.shape, this.#device)
    this.#value = keep(first.to(this.#dtype))
    if (this.#value !== first) first.dispose()
    this.#device = this.#value.device
  }

  /** A parameter that holds `tensor` and owns it. */
  static of(tensor: Tensor): Parameter {
    const parameter = new Parameter(tensor.shape, { dtype: tensor.dtype, device: tensor.device })
    parameter.replace(asLeaf(tensor))
    return parameter
  }

  /** Whether there is a value, in memory or to be brought in. */
  get isLoaded(): boolean {
    return this.#value !== undefined || this.#source !== undefined
  }

  get isOffloaded(): boolean {
    return this.#source !== undefined
  }

  /** The tensor; ERR_HALFBYTE_STATE_DICT while there is none, ERR_HALFBYTE_DISPOSED when there is none any more. */
  get value(): Tensor {
    if (this.#value) return this.#value
    if (this.#disposed) {
      throw new HalfbyteError(
        'ERR_HALFBYTE_DISPOSED',
        `${this.path || 'A parameter'} [${this.shape.join(', ')}] is used after its model was disposed`,
      )
    }
    if (this.#source) {
      throw new HalfbyteError(
        'ERR_HALFBYTE_USAGE',
        `${this.path || 'A parameter'} [${this.shape.join(', ')}] lies on the disk, and in memory only while its ` +
          'module runs; stateDict() reads it',
      )
    }
    throw new HalfbyteError(
      'ERR_HALFBYTE_STATE_DICT',
      `${this.path || 'A parameter'} [${this.shape.join(', ')}] is used before it is loaded; ` +
        'load the model with loadStateDict() or fromPretrained()',
    )
  }

  /** The tensor, or undefined while there is none. */
  get tensor(): Tensor | undefined {
    return this.#value
  }

  /** Of the value, else what a loaded one will have; undefined when that is left to the one that arrives. */
  get dtype(): DType | undefined {
    return this.#value?.dtype ?? this.#dtype
  }

  get device(): Device | undefined {
    return this.#value?.device ?? this.#device
  }

  /** Bytes of the value, or those that it will have (float32 while the dtype is open). */
  get nbytes(): number {
    return sizeOf(this.shape) * DTYPES[this.dtype ?? 'float32'].bytes
  }

  /** Whether backward() computes a gradient for the value, and for those that take its place. Float dtypes only. */
  get requiresGrad(): boolean {
    return this.#value?.requiresGrad ?? this.#requiresGrad
  }

  set requiresGrad(wanted: boolean) {
    if (wanted) this.checkGradient()
    if (this.#value) this.#value.requiresGrad = wanted
    this.#requiresGrad = wanted
  }

  /** @internal From now on there is no gradient, for a reason that is not the dtype; throws where one is wanted. */
  refuseGradient(reason: string): void {
    if (this.requiresGrad) throw this.#withoutGradient(reason)
    this.#refusal = reason
  }

  #withoutGradient(reason: string): HalfbyteError {
    return new HalfbyteError(
      'ERR_HALFBYTE_USAGE',
      `requiresGrad: ${this.path || 'the parameter'} has no gradient: ${reason}`,
    )
  }

  /** Throws when there can be no gradient: ERR_HALFBYTE_DTYPE, or ERR_HALFBYTE_USAGE for where the value lies. */
  checkGradient(): void {
    const { dtype } = this
    if (this.#refusal !== undefined) throw this.#withoutGradient(this.#refusal)
    if (!dtype || DTYPES[dtype].isFloat) return
    throw new HalfbyteError(
      'ERR_HALFBYTE_DTYPE',
      `requiresGrad: ${this.path || 'the parameter'} is ${dtype}, which has no gradient; ` +
        'a quantised weight is not learnt, what is added to its product is',
    )
  }

  /** Of the value: see Tensor.grad. */
  get grad(): Tensor | undefined {
    return this.#value?.grad
  }

  /** What makes two parameters one: the same tensor, or the same unloaded place. */
  get identity(): object {
    return this.#value ?? this
  }

  /** Frees the value and leaves it to `source`, which makes one whenever it is brought in. */
  offload(source: ParameterSource): void {
    this.refuseGradient('it lies on the disk, and in memory only while its module runs')
    this.#value?.dispose()
    this.#value = undefined
    this.#source = source
  }

  /** Has the value of an offloaded parameter in memory until release(). */
  bringIn(): void {
    if (this.#source && !this.#value) this.#value = keep(this.#source.bringIn())
  }

  release(): void {
    if (!this.#source) return
    this.#value?.dispose()
    this.#value = undefined
  }

  /** The value as a tensor of the caller's own, without gradient; that of an offloaded parameter is read, to the CPU. */
  share(): Tensor {
    return this.#value || !this.#source ? this.value.detach() : this.#source.read(toDevice('cpu'))
  }

  /** Its entry in state dicts. */
  stateEntry(): StateEntry {
    const read = () => this.share()
    if (this.#value || !this.#source) return { ...entryOf(this.value), read }
    return { dtype: this.dtype!, shape: this.shape, key: this, read }
  }

  /** Why a tensor cannot be loaded here, or undefined when it can. */
  reject(tensor: Tensor): string | undefined {
    const shape = tensor.shape
    if (shape.length !== this.shape.length || shape.some((n, i) => n !== this.shape[i])) {
      return `has shape [${shape.join(', ')}], the model has [${this.shape.join(', ')}]`
    }
    const wanted = this.dtype
    if (wanted && wanted !== tensor.dtype && !(DTYPES[wanted].isFloat && DTYPES[tensor.dtype].isFloat)) {
      return `is ${tensor.dtype}, the model has ${wanted}`
    }
    return undefined
  }

  /** Takes `tensor` over as the value, converted to this parameter's dtype and device. */
  load(tensor: Tensor): void {
    this.refuseOffloaded(tensor)
    const problem = this.reject(tensor)
    if (problem) {
      tensor.dispose()
      throw new HalfbyteError('ERR_HALFBYTE_STATE_DICT', `${this.path || 'parameter'} ${problem}`)
    }
    const dtype = this.#dtype ?? tensor.dtype
    const leaf = asLeaf(tensor)
    const converted = noGrad(() => leaf.to({ dtype, device: this.#device ?? leaf.device }))
    if (converted !== leaf) leaf.dispose()
    const old = this.#value
    this.replace(converted)
    if (old !== converted) old?.dispose()
  }

  /** Disposes `tensor` and throws ERR_HALFBYTE_USAGE where the value lies on the disk. */
  refuseOffloaded(tensor: Tensor): void {
    if (!this.#source) return
    tensor.dispose()
    throw onDiskError(this.path || 'The parameter')
  }

  /** Puts `tensor` (or nothing) in place without checks; the old value is the caller's again. */
  replace(tensor: Tensor | undefined): void {
    const wanted = this.requiresGrad
    if (tensor && wanted) tensor.requiresGrad = true
    this.#requiresGrad = wanted
    if (this.#source) this.#refusal = undefined
    this.#source = undefined
    this.#value = tensor && keep(tensor)
    if (!tensor) return
    this.#disposed = false
    this.#dtype = tensor.dtype
    this.#device = tensor.device
  }

  /** @internal Puts the same bytes in another order in place of the value, which is disposed; an offloaded one stays so. */
  rearrange(tensor: Tensor): void {
    this.#value?.dispose()
    this.#value = keep(tensor)
  }

  /** @internal What a value that is still to come will have. */
  retarget(target: { dtype?: DType | undefined; device?: Device | undefined }): void {
    this.#dtype = target.dtype ?? this.#dtype
    this.#device = target.device ?? this.#device
  }

  toString(): string {
    const where = this.#disposed ? 'disposed' : this.isLoaded ? `on ${this.device?.name}` : 'not loaded'
    const name = this.path && `${this.path}: `
    return `${this.constructor.name}(${name}${this.dtype ?? 'any dtype'} [${this.shape.join(', ')}], ${where})`
  }

  [inspect.custom](): string {
    return this.toString()
  }

  dispose(): void {
    if (!this.isLoaded) return
    this.#value?.dispose()
    this.#value = undefined
    this.#source = undefined
    this.#disposed = true
  }

  [Symbol.dispose](): void {
    this.dispose()
  }
}

/**
 * A tensor that belongs to a module and is not learnt. It moves with the module and counts in its footprint; a cast
 * of the model leaves its dtype alone. Part of the state dict when persistent.
 */
export class Buffer extends Parameter {
  override readonly kind = 'buffer'
  override readonly persistent: boolean

  constructor(shape: Shape, options: ParameterOptions & { persistent?: boolean } = {}) {
    super(shape, options)
    this.persistent = options.persistent ?? true
  }

  static override of(tensor: Tensor, options: { persistent?: boolean } = {}): Buffer {
    const buffer = new Buffer(tensor.shape, { dtype: tensor.dtype, device: tensor.device, ...options })
    buffer.replace(tensor)
    return buffer
  }
}

/** A Tensor held by a property, seen as a parameter: a new value goes back to the property. */
export class TensorProperty extends Parameter {
  readonly #owner: Record<string, unknown>
  readonly #name: string

  constructor(owner: Record<string, unknown>, name: string, tensor: Tensor) {
    super(tensor.shape, { dtype: tensor.dtype, device: tensor.device })
    this.#owner = owner
    this.#name = name
    super.replace(tensor)
  }

  override replace(tensor: Tensor | undefined): void {
    super.replace(tensor)
    this.#owner[this.#name] = tensor
  }
}
