/** A weight that is kept in another form than a tensor of its shape: what a module needs to know about it. */
import type { Device } from '../tensor/device.js'
import type { DType } from '../tensor/dtype.js'
import type { Tensor } from '../tensor/tensor.js'
import type { Init } from './init.js'
import type { OwnProblems, StateEntry } from './state_dict.js'

/** The tensor on a device, as one of the caller's own. */
export function onDevice(tensor: Tensor, device: Device): Tensor {
  return tensor.device === device ? tensor.share() : tensor.to(device)
}

/** Names are those of the module that holds the weight: 'weight', 'weight.absmax', ... */
export interface PackedWeight {
  /** Whether a state-dict name is one of this weight's. */
  accepts(name: string): boolean
  /** Names that are still to be loaded. */
  missing(): string[]
  /** What is wrong with those tensors of a state dict whose names it accepts. */
  problems(own: ReadonlyMap<string, Tensor>): OwnProblems
  /** Takes over one tensor. */
  load(name: string, tensor: Tensor): Promise<void>
  /** Entries of the state dict. */
  entries(): Promise<[string, StateEntry][]>
  /** Tensors besides the parameter that holds the codes. */
  statistics(): Iterable<[string, Tensor]>
  /** NaN and infinite elements of what was quantised. */
  nonfinite(): Promise<number>
  /** Moves the statistics; the module moves the codes. */
  move(device: Device): void
  /**
   * Frees what is large and leaves it to `read`, which gives it by the names and in the form of checkpoints ('weight',
   * 'weight.absmax') whenever it is brought in, or asked for `on` another device.
   */
  offload(read: (name: string, on?: Device) => Tensor): void
  /** Has an offloaded weight in memory until release(). */
  bringIn(): void
  release(): void
  /** Why it has no dtype to change, or undefined when it has. */
  castRefusal(): string | undefined
  dispose(): void
}

/** A packed weight that is made of float values. */
export interface QuantizedWeight extends PackedWeight {
  /** Packs a float weight, which stays the caller's. */
  quantize(weight: Tensor): void
  /** Packs first values. */
  quantizeValues(init: Init): void
  /** The float values; default dtype: that of the weight before it was quantised. */
  dequantize(dtype?: DType): Tensor
}
