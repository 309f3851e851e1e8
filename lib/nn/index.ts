export { Activation, GELU, ReLU, SiLU } from './activations.js'
export { packedAttention, SelfAttention, type SelfAttentionOptions } from './attention.js'
export { ModuleList, Sequential } from './containers.js'
export { Embedding } from './embedding.js'
export {
  Embedding4bit,
  Embedding8bit,
  EmbeddingFP4,
  EmbeddingNF4,
  type Embedding4bitOptions,
} from './embedding_quantized.js'
export {
  FusedExperts,
  SplitExperts,
  type ExpertActivation,
  type Experts,
  type ExpertsOptions,
} from './experts.js'
export { manualSeed } from './init.js'
export { Conv1D, Linear, type LinearLayerOptions } from './linear.js'
export {
  Linear4bit,
  LinearFP4,
  LinearNF4,
  type Linear4bitOptions,
  type Quantize4Options,
} from './linear4bit.js'
export { Linear8bit, type Linear8bitOptions } from './linear8bit.js'
export { Module } from './module.js'
export type { MoveTarget } from '../tensor/target.js'
export { LayerNorm, RMSNorm, type Normed } from './norms.js'
export type { PackedWeight } from './packed.js'
export { Buffer, onMeta, Parameter, type ParameterOptions, type Placement } from './parameter.js'
export type { LoadStateDictResult, OwnProblems, StateEntry } from './state_dict.js'
