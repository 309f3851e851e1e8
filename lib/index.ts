export { HalfbyteError, type ErrorCode } from './errors.js'
export * from './tensor/index.js'
export * as ops from './tensor/ops.js'
export * as nn from './nn/index.js'
export {
  Conv1D,
  Embedding,
  Embedding4bit,
  Embedding8bit,
  EmbeddingFP4,
  EmbeddingNF4,
  FusedExperts,
  LayerNorm,
  Linear,
  Linear4bit,
  Linear8bit,
  LinearFP4,
  LinearNF4,
  manualSeed,
  Module,
  ModuleList,
  onMeta,
  packedAttention,
  Parameter,
  RMSNorm,
  SelfAttention,
  Sequential,
  SplitExperts,
  type Placement,
} from './nn/index.js'
export * from './quantization/index.js'
export * from './patch/index.js'
export * from './checkpoint/index.js'
export * from './generation/index.js'
export * from './models/index.js'
export { pipeline, TextGenerationPipeline, type PipelineInput } from './pipeline.js'
