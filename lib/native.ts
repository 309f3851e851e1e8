/**
 * The addon as TypeScript sees it: types of what native/ exports, and the search for the binary.
 * Only lib/tensor/ and lib/checkpoint/ import this file.
 */
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { HalfbyteError } from './errors.js'

/** A view (byte offset, shape, strides, dtype) on a reference-counted device storage. */
export interface NativeTensor {
  /** A further view on the same storage; strides and offset count elements of this dtype, from the storage's start. */
  view(dtype: number, shape: readonly number[], strides: readonly number[], offset: number): NativeTensor
  /** Drops this handle's reference. Work that is already queued keeps its own. Idempotent. */
  dispose(): void
  /** Bytes of the storage behind the view. */
  readonly storageBytes: number
  /** The same number for two views exactly when they share a storage. */
  readonly storageId: number
}

export interface NativeGraph {
  replay(): void
  dispose(): void
}

export interface NativeMemory {
  total: number
  free: number
  allocated: number
  reserved: number
  peak: number
}

/** A device of the process. Every call but the promises returns at once; work runs in order on native threads. */
export interface NativeDevice {
  readonly name: string
  /** Whether the device's 4-bit products want their weights in the tiled layout. */
  readonly tiles4bit: boolean
  /** A contiguous tensor with undefined content. */
  empty(dtype: number, shape: readonly number[]): NativeTensor
  /** From host bytes. copy = false keeps a reference to the array and uses its memory where the device can. */
  fromHost(dtype: number, shape: readonly number[], data: ArrayBufferView, copy: boolean): NativeTensor
  /**
   * Appends op `id` to the compute queue. null stands for an absent optional operand. Outputs are operands that are
   * written (and may be read). An op whose inputs failed does not run; its outputs carry the failure on.
   */
  run(
    id: number,
    outputs: readonly (NativeTensor | null)[],
    inputs: readonly (NativeTensor | null)[],
    scalars: readonly number[],
  ): void
  /** Whether ops on experts' weights are worth it; see takesExperts(). */
  takesExperts(form: readonly number[]): boolean
  /** Contiguous bytes of a contiguous tensor, once everything queued before has run. Rejects with its failure. */
  read(tensor: NativeTensor): Promise<ArrayBuffer>
  /** Overwrites a contiguous tensor with host bytes, in queue order. */
  write(tensor: NativeTensor, data: ArrayBufferView): void
  /** A copy on this device of a tensor of any device, over the copy queues. */
  copyFrom(tensor: NativeTensor): NativeTensor
  synchronize(): Promise<void>
  memory(): NativeMemory
  resetPeak(): void
  /** Ops queued from here on are recorded and not run, until endCapture. One capture at a time per device. */
  beginCapture(): void
  endCapture(): NativeGraph
}

/** A file that is open for reading, range by range. */
export interface NativeFile {
  readonly size: number
  /** Bytes copied into a fresh ArrayBuffer (a header, say). */
  bytes(begin: number, end: number): ArrayBuffer
  /**
   * The range as a tensor of a device: read by threads of their own, and copied there on its copy queue. Memory for it
   * is taken when the work that touches `after` is done.
   */
  tensor(
    device: NativeDevice,
    dtype: number,
    shape: readonly number[],
    byteOffset: number,
    after?: NativeTensor | null,
  ): NativeTensor
  close(): void
}

/** What the CUDA runtime says; see lib/tensor/cuda.ts for what it means. */
export interface CudaFacts {
  compiled: boolean
  archs: string
  /** CUDA versions of the driver and of the runtime inside: 13000 for 13.0, 0 for none. */
  driver: number
  runtime: number
  devices: number
  /** What the runtime answered when it could not count the devices. */
  failure: string
}

export interface NativeBinding {
  readonly version: string
  /** Names of ops in the order of their ids. */
  readonly ops: readonly string[]
  /** Names of the devices present: 'cpu', 'cuda:0', ... */
  devices(): string[]
  /** Opens a device; 'cpu:1' and further ones are made on demand. Throws for one that is not there. */
  device(name: string): NativeDevice
  /** nf4, fp4 (16 entries), dynamic, dynamic_unsigned (256). */
  codebook(name: string): Float32Array
  /** The complaints are '' where the environment was obeyed. */
  cpuInfo(): { isa: string; vnni: boolean; threads: number; isaComplaint: string; threadsComplaint: string }
  cudaInfo(): CudaFacts
  /** Whether cuBLASLt, which dense products on CUDA run on, was found, and where; looked for at the first call. */
  denseLibrary(): { found: boolean; where: string }
  /** [bytes read per second, fp32 operations per second], measured now on the pool of the CPU devices. */
  cpuPeaks(): Promise<number[]>
  openFile(path: string): NativeFile
}

const root = join(__dirname, '..')

const override = process.env['HALFBYTE_BINDING']
/** As a package, not as a checkout. */
const installed = !existsSync(join(root, 'package-lock.json'))

function candidates(): string[] {
  if (override) return [override]
  return [
    join(root, 'build-cmake', 'Release', 'halfbyte.node'),
    join(root, 'build', 'Release', 'halfbyte.node'),
    join(root, 'prebuilds', `${process.platform}-${process.arch}`, 'halfbyte.node'),
  ]
}

/** Path of the binary that was loaded. */
export let bindingPath = ''

function load(): NativeBinding {
  const tried = candidates()
  const failures: string[] = []
  for (const path of tried) {
    if (!existsSync(path)) {
      failures.push(`${path}: not there`)
      continue
    }
    try {
      // eslint-disable-next-line @typescript-eslint/no-require-imports -- an addon has no other way in
      const binding = require(path) as NativeBinding
      bindingPath = path
      return binding
    } catch (cause) {
      failures.push(`${path}: ${(cause as Error).message}`)
    }
  }
  throw new HalfbyteError(
    'ERR_HALFBYTE_BINDING',
    `No usable native binding for ${process.platform}-${process.arch}. Tried:\n  ${failures.join('\n  ')}\n` +
      (override
        ? 'It was named by HALFBYTE_BINDING'
        : installed
          ? 'Build it where it is installed with: npm explore halfbyte -- npm run build:gyp (needs a C++17 compiler, ' +
            'make and Python 3, and nvcc for the CUDA backend)'
          : 'Build it with: npm run build:native (needs CMake and a C++17 compiler) or: npm run build:gyp'),
  )
}

export const native: NativeBinding = load()
