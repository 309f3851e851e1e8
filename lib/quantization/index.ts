export {
  BitsAndBytesConfig,
  type BitsAndBytesConfigOptions,
  type ComputeDType,
  type QuantStorage,
} from './config.js'
export * as functional from './functional.js'
export { getMemoryFootprint, getTrueFootprint } from './footprint.js'
export {
  dequantize,
  quantizedLinear,
  replaceWithQuantizedLinear,
  type Quantizable,
  type ReplaceOptions,
  type Replacement,
  type ReplacementReport,
} from './patch.js'
export { QuantState, type NestedState, type QuantStateParts, type StateValue } from './quant_state.js'
export { matchesModule, type OutputEmbeddings } from './skip.js'
