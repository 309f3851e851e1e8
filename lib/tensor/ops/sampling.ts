import { Tensor } from '../tensor.js'
import {
  call,
  checkContiguous,
  checkDTypes,
  checkFloat,
  checkShape,
  fail,
  show,
  withContiguous,
} from './call.js'

/** float32 [R]: -log softmax(logits[r])[targets[r]] for logits [R, V]; a negative target gives 0. */
export function crossEntropy(logits: Tensor, targets: Tensor): Tensor {
  checkFloat('crossEntropy', 'logits', logits)
  checkDTypes('crossEntropy', 'targets', targets, 'int32', 'int64')
  if (logits.ndim !== 2) fail('crossEntropy', `logits are ${show(logits.shape)}, they must be [R, V]`)
  checkShape('crossEntropy', 'targets', targets, [logits.shape[0]!])
  return withContiguous([logits, targets], (x, t) => {
    const y = Tensor.empty([logits.shape[0]!], 'float32', logits.device)
    call('cross_entropy', [y], [x, t])
    return y
  })
}

/** int32 [...]: index of the largest element along the last dimension, the lowest on ties. */
export function argmax(x: Tensor): Tensor {
  checkFloat('argmax', 'x', x)
  if (!x.shape.at(-1)) fail('argmax', `${show(x.shape)} has nothing to choose from`)
  return withContiguous([x], (input) => {
    const y = Tensor.empty(x.shape.slice(0, -1), 'int32', x.device)
    call('argmax', [y], [input])
    return y
  })
}

export interface SampleState {
  /** float32 [S, 5]: temperature (0 greedy), top-k (0 off), top-p (1 off), min-p (0 off), repetition penalty (1 off). */
  params: Tensor
  /** int64 [S, 2]: seed and draw counter; the counter advances. */
  rng: Tensor
  /** uint8 [S, V]: tokens that the repetition penalty applies to; the chosen one is added. */
  seen?: Tensor | undefined
}

/**
 * Chooses tokens int32 [S] from logits float [S, V], on the device: repetition penalty, temperature, top-k, top-p and
 * min-p in this order. The draw depends on seed and counter alone; kernels/backend.h has the exact definition.
 */
export function sample(logits: Tensor, state: SampleState): Tensor {
  checkFloat('sample', 'logits', logits)
  if (logits.ndim !== 2 || logits.shape[1] === 0)
    fail('sample', `logits are ${show(logits.shape)}, they must be [S, V]`)
  const [sequences, vocabulary] = logits.shape as [number, number]
  checkDTypes('sample', 'params', state.params, 'float32')
  checkShape('sample', 'params', state.params, [sequences, 5])
  checkDTypes('sample', 'rng', state.rng, 'int64')
  checkShape('sample', 'rng', state.rng, [sequences, 2])
  checkContiguous('sample', 'rng', state.rng)
  if (state.seen) {
    checkDTypes('sample', 'seen', state.seen, 'uint8')
    checkShape('sample', 'seen', state.seen, [sequences, vocabulary])
    checkContiguous('sample', 'seen', state.seen)
  }
  return withContiguous([logits, state.params], (x, params) => {
    const tokens = Tensor.empty([sequences], 'int32', logits.device)
    call('sample', [tokens, state.rng, state.seen], [x, params])
    return tokens
  })
}
