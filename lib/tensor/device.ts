import { inspect } from 'node:util'
import { HalfbyteError } from '../errors.js'
import { native, type NativeDevice, type NativeGraph } from '../native.js'
import { emitWarning } from '../warning.js'
import { cudaError, cudaProblem, standardDevice } from './cuda.js'
import { rethrow, rethrowAsync } from './rethrow.js'
import { refusePromise } from './tidy.js'
import { watchWrites, type Writes } from './writes.js'

export interface MemoryUsage {
  /** Bytes the device has, and bytes nobody uses. */
  total: number
  free: number
  /** Bytes in live tensors, their highest value so far, and bytes the pool holds in all. */
  allocated: number
  peak: number
  reserved: number
}

/** A device of this process. Work is queued and runs in order; `synchronize()` waits for all of it. */
export class Device {
  /** 'cpu', 'cpu:1', 'cuda:0', ... */
  readonly name: string
  readonly type: 'cpu' | 'cuda'
  readonly index: number
  /** @internal */
  readonly native: NativeDevice

  /** @internal Use `device(name)`. */
  constructor(handle: NativeDevice) {
    this.native = handle
    this.name = handle.name
    const [type, index] = handle.name.split(':')
    this.type = type as 'cpu' | 'cuda'
    this.index = Number(index ?? 0)
  }

  /** Resolves when everything queued so far has run, on both queues. */
  async synchronize(): Promise<void> {
    await rethrowAsync(this.native.synchronize())
  }

  memoryUsage(): MemoryUsage {
    return this.native.memory()
  }

  /** Starts a new measurement of `memoryUsage().peak`. */
  resetPeakMemory(): void {
    this.native.resetPeak()
  }

  /**
   * Records the ops that `fn` queues instead of running them; `replay()` runs them again, on the same tensors, as
   * often as wanted. What is allocated inside lives until the graph is disposed.
   */
  capture(fn: () => void): Graph {
    rethrow(() => this.native.beginCapture())
    let writes: ReadonlySet<Writes>
    try {
      writes = watchWrites(() => refusePromise('capture', fn()))
    } catch (error) {
      rethrow(() => this.native.endCapture()).dispose()
      throw error
    }
    return new Graph(
      rethrow(() => this.native.endCapture()),
      writes,
    )
  }

  toString(): string {
    return this.name
  }

  [inspect.custom](): string {
    return `Device(${this.name})`
  }
}

/** A recorded list of ops. */
export class Graph {
  readonly #native: NativeGraph
  /** Of memory that was there before the capture. */
  readonly #writes: ReadonlySet<Writes>
  #disposed = false

  /** @internal Use `device.capture(fn)`. */
  constructor(handle: NativeGraph, writes: ReadonlySet<Writes>) {
    this.#native = handle
    this.#writes = writes
  }

  replay(): void {
    if (this.#disposed)
      throw new HalfbyteError('ERR_HALFBYTE_DISPOSED', 'Graph.replay: the graph was disposed')
    rethrow(() => this.#native.replay())
    for (const writes of this.#writes) writes.add()
  }

  dispose(): void {
    if (this.#disposed) return
    this.#disposed = true
    this.#native.dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }
}

let warned = false

/** Settings of the environment that cannot be obeyed are said once, not passed over. */
function warnOfCpu(): void {
  if (warned) return
  warned = true
  const { isa, threads, isaComplaint, threadsComplaint } = native.cpuInfo()
  if (isaComplaint) emitWarning(`${isaComplaint}: the kernels of ${isa} are used`)
  if (threadsComplaint) emitWarning(`${threadsComplaint}: ${threads} threads are used`)
}

export type DeviceLike = Device | string

const opened = new Map<string, Device>()

/** The device of that name: 'cpu', 'cpu:N', 'cuda', 'cuda:N'. ERR_HALFBYTE_DEVICE when it is not there. */
export function device(like: DeviceLike): Device {
  if (like instanceof Device) return like
  if (typeof like !== 'string' || !/^(cpu|cuda)(:\d+)?$/.test(like)) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_DEVICE',
      `device: ${JSON.stringify(like)} is not a device; the names are cpu, cpu:N, cuda and cuda:N`,
    )
  }
  const name = like === 'cuda' ? 'cuda:0' : like === 'cpu:0' ? 'cpu' : like
  let found = opened.get(name)
  if (!found) {
    const problem = name.startsWith('cuda') && cudaProblem(native.cudaInfo())
    if (problem) throw cudaError(name, problem)
    if (name.startsWith('cpu')) warnOfCpu()
    found = new Device(rethrow(() => native.device(name)))
    opened.set(name, found)
  }
  return found
}

/** Every device present, the CPU first. */
export function devices(): Device[] {
  return native.devices().map((name) => device(name))
}

let standard: Device | undefined

/**
 * The device to use when none is named: HALFBYTE_DEVICE at the first call, else cuda:0 if there is one, else cpu.
 * ERR_HALFBYTE_DRIVER where a GPU's driver is too old for this build.
 */
export function defaultDevice(): Device {
  standard ??= device(
    process.env['HALFBYTE_DEVICE'] || standardDevice(native.devices(), native.cudaInfo(), emitWarning),
  )
  return standard
}
