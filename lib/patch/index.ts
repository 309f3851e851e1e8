export { getMemoryFootprint, getTrueFootprint } from './footprint.js'
export {
  dequantize,
  quantizedLinear,
  replaceWithQuantizedLinear,
  type Quantizable,
  type ReplaceOptions,
  type Replacement,
  type ReplacementReport,
} from './replace.js'
export { matchesModule, type OutputEmbeddings } from './skip.js'
