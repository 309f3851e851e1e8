export {
  BitsAndBytesConfig,
  type BitsAndBytesConfigOptions,
  type ComputeDType,
  type QuantStorage,
} from './config.js'
export * as functional from './functional.js'
export { QuantState, type NestedState, type QuantStateParts, type StateValue } from './quant_state.js'
