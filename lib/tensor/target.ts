/** Where tensors and models are moved, and what they are cast to. */
import { HalfbyteError } from '../errors.js'
import { device as toDevice, type Device, type DeviceLike } from './device.js'
import { checkDType, DTYPES, type DType } from './dtype.js'

export type MoveTarget = DType | DeviceLike | { dtype?: DType; device?: DeviceLike }

/** What a call of to() asks for. */
export function readTarget(target: MoveTarget): { dtype?: DType; device?: Device } {
  if (typeof target !== 'string' && (typeof target !== 'object' || target === null)) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_VALUE',
      `to: ${String(target)} is neither a dtype nor a device, nor { dtype, device }`,
    )
  }
  if (typeof target === 'string' && Object.hasOwn(DTYPES, target)) return { dtype: target as DType }
  if (typeof target === 'string' || 'native' in target) return { device: toDevice(target) }
  const { dtype, device } = target
  return {
    ...(dtype != null && { dtype: checkDType(dtype, 'to') }),
    ...(device != null && { device: toDevice(device) }),
  }
}
