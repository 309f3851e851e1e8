/** Linear layers on a GPU, over the shapes of Llama models of 8 and 70 billion parameters and any number of rows. */
import { denseLibrary, HalfbyteError, ops, type Device, type DType, type Tensor } from 'halfbyte'
import { relative } from './exact.js'
import { normalTensor } from './random.js'
import { coldCopiesOnGpu, timeReplays } from './replays.js'

/** N, K: q, k, v of 8B; its output projection; gate and up; down; 70B: output projection, gate and up, down. */
export const SHAPES: readonly (readonly [number, number])[] = [
  [6144, 4096],
  [4096, 4096],
  [28672, 4096],
  [4096, 14336],
  [8192, 8192],
  [57344, 8192],
  [8192, 28672],
]

/** Where cuBLASLt is: without it there is nothing to compare with. */
export function requireDenseLibrary(): string {
  const { found, where } = denseLibrary()
  if (found) return where
  throw new HalfbyteError('ERR_HALFBYTE_UNSUPPORTED', `the baseline, cuBLASLt, is not there; tried ${where}`)
}

/** A random weight [N, K]. */
export function randomWeight(n: number, k: number, device: Device, dtype: DType): Tensor {
  using wide = normalTensor([n, k], 0.02, device, n + k)
  return wide.to(dtype)
}

/** One layer in the form that is measured: `copies` of its weight in turn, of `bytes` each. */
export interface Layer {
  bytes: number
  copies: number
  forward: (x: Tensor, copy: number) => Tensor
}

/** One whose results can be checked. */
export interface CheckedLayer extends Layer {
  /** Float values of row `n` of the weight. */
  row: (n: number) => Promise<Float32Array>
}

/** The dense product that the forms are compared with. */
export function denseLayer(weight: Tensor): Layer & Disposable {
  const bytes = weight.nbytes
  const copies = coldCopiesOnGpu(bytes)
  const weights = [weight, ...Array.from({ length: copies - 1 }, () => weight.clone())]
  return {
    bytes,
    copies,
    forward: (x, copy) => ops.linear(x, weights[copy]!),
    [Symbol.dispose]: () => weights.slice(1).forEach((copy) => copy.dispose()),
  }
}

export function timeLayer(device: Device, layer: Layer, x: Tensor, rounds: number): Promise<number> {
  return timeReplays(device, layer.copies, (i) => layer.forward(x, i), rounds)
}

/** Relative error of a sample of the layer's results against sums in double precision. */
export async function sampleError(layer: CheckedLayer, x: Tensor): Promise<number> {
  using y = layer.forward(x, layer.copies - 1)
  const [m, n] = y.shape as [number, number]
  const rows = [...new Set([0, 1, n >> 1, Math.floor(n * 0.7), n - 2, n - 1])]
  const tokens = [...new Set([0, m >> 1, m - 1])]
  const inputs = await Promise.all(tokens.map((token) => x.slice(0, token, token + 1).floats()))
  const results = await Promise.all(tokens.map((token) => y.slice(0, token, token + 1).floats()))
  const found: number[] = []
  const expected: number[] = []
  for (const row of rows) {
    const weight = await layer.row(row)
    for (const [i, input] of inputs.entries()) {
      found.push(results[i]![row]!)
      expected.push(input.reduce((sum, value, at) => sum + value * weight[at]!, 0))
    }
  }
  return relative(found, expected)
}
