export { HalfbyteError, type ErrorCode } from './errors.js'
export * from './tensor/index.js'
export * as ops from './tensor/ops.js'
