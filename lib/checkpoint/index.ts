export { ConfigReader, readConfig, readGenerationDefaults, type GenerationDefaults } from './config.js'
export {
  cleanDeviceMap,
  evenDeviceMap,
  getBalancedMemory,
  inferAutoDeviceMap,
  type BalanceOptions,
  type DeviceMap,
  type MapOptions,
  type NoSplitModules,
} from './device_map.js'
export { dispatchModel } from './dispatch.js'
export type { TensorInfo } from './header.js'
export { loadCheckpoint, type LoadOptions, type LoadProgress, type LoadReport } from './load.js'
export { getMaxMemory, type MaxMemory, type PlaceLike } from './max_memory.js'
export {
  mapByStrategy,
  resolveDeviceMap,
  type DeviceMapOption,
  type MapStrategy,
  type PlacementOptions,
} from './placement.js'
export { SafetensorsFile } from './safetensors.js'
export { Checkpoint } from './source.js'
export { saveStateDict, writeSafetensors, type WriteOptions } from './write.js'
