export {
  BitsAndBytesConfig,
  type BitsAndBytesConfigOptions,
  type ComputeDType,
  type QuantStorage,
} from './config.js'
export * as functional from './functional.js'
export { QuantState, type QuantStateParts, type StateValue } from './quant_state.js'
export type { NestedState } from './statistics.js'
