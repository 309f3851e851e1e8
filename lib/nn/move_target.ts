import { device as toDevice, type Device, type DeviceLike } from '../tensor/device.js'
import { checkDType, DTYPES, type DType } from '../tensor/dtype.js'

/** Where Module.to() moves a model, and what it casts it to. */
export type MoveTarget = DType | DeviceLike | { dtype?: DType; device?: DeviceLike }

export function readTarget(target: MoveTarget): { dtype?: DType; device?: Device } {
  if (typeof target === 'string' && Object.hasOwn(DTYPES, target)) return { dtype: target as DType }
  if (typeof target === 'string' || 'native' in target) return { device: toDevice(target) }
  return {
    ...(target.dtype && { dtype: checkDType(target.dtype, 'to') }),
    ...(target.device && { device: toDevice(target.device) }),
  }
}
