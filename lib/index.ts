export { HalfbyteError, type ErrorCode } from './errors.js'
export * from './tensor/index.js'
export * as ops from './tensor/ops.js'
export * as nn from './nn/index.js'
export {
  Conv1D,
  Embedding,
  LayerNorm,
  Linear,
  manualSeed,
  Module,
  ModuleList,
  onMeta,
  Parameter,
  RMSNorm,
  Sequential,
} from './nn/index.js'
