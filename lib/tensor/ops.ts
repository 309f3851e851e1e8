/** Every op once, with its arguments checked. An op queues its work and returns; see Tensor.data(). */
export * from './ops/attention.js'
export * from './ops/experts.js'
export * from './ops/layout.js'
export * from './ops/linear.js'
export * from './ops/norms.js'
export * from './ops/quantize.js'
export * from './ops/reduce.js'
export * from './ops/sampling.js'
