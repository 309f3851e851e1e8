/** How much memory a model's tensors take. */
import type { Module } from '../nn/module.js'
import type { Parameter } from '../nn/parameter.js'
import type { Tensor } from '../tensor/tensor.js'

function bytes(parameters: Iterable<[string, Parameter]>): number {
  let sum = 0
  for (const [, parameter] of parameters) sum += parameter.nbytes
  return sum
}

/**
 * Bytes of parameters and buffers, tied ones once: the number that transformers' get_memory_footprint() gives. Like
 * there, the statistics of quantised weights (absmax, SCB) are not in it; see getTrueFootprint().
 */
export function getMemoryFootprint(model: Module, options: { returnBuffers?: boolean } = {}): number {
  const buffers = (options.returnBuffers ?? true) ? bytes(model.namedBuffers()) : 0
  return bytes(model.namedParameters()) + buffers
}

/** getMemoryFootprint() and the statistics of quantised weights, without what lies on the disk: all that is in memory. */
export function getTrueFootprint(model: Module): number {
  const statistics = new Set<Tensor>()
  for (const module of model.modules()) {
    for (const [, tensor] of module.ownStatistics()) statistics.add(tensor)
  }
  const resident = model
    .parameters()
    .reduce((sum, p) => sum - (p.isOffloaded && !p.tensor ? p.nbytes : 0), getMemoryFootprint(model))
  return [...statistics].reduce((sum, tensor) => sum + tensor.nbytes, resident)
}
