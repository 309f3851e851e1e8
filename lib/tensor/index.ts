export { Device, Graph, defaultDevice, device, devices, type DeviceLike, type MemoryUsage } from './device.js'
export { DTYPES, type DType, type TypedArray } from './dtype.js'
export { Tensor, sizeOf, type Nested, type Shape, type TensorOptions } from './tensor.js'
export { keep, tidy } from './tidy.js'
