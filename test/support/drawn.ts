/** Tensors of random numbers, and such that want a gradient. */
import { Tensor, type Device } from '../../lib/index'
import { randn } from './reference'

/** Other numbers at each call, the same in each run. */
export function drawn(on: Device) {
  let seed = 1
  const random = (...shape: number[]) =>
    Tensor.from(
      randn(
        shape.reduce((a, b) => a * b, 1),
        seed++,
      ),
      { shape, device: on },
    )
  const leaf = (...shape: number[]) => {
    const x = random(...shape)
    x.requiresGrad = true
    return x
  }
  return { random, leaf }
}
