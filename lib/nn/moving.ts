/** Moving and casting whole models; see Module.to. */
import { HalfbyteError } from '../errors.js'
import { noGrad } from '../tensor/autograd.js'
import type { Device } from '../tensor/device.js'
import { DTYPES, type DType } from '../tensor/dtype.js'
import { readTarget, type MoveTarget } from '../tensor/target.js'
import type { Tensor } from '../tensor/tensor.js'
import { tidy } from '../tensor/tidy.js'
import { isSpread } from './hooks.js'
import type { Module } from './module.js'
import type { Parameter } from './parameter.js'
import { refreshCopies } from './tied.js'

function checkCast(model: Module, dtype: DType): void {
  if (!DTYPES[dtype].isFloat) {
    throw new HalfbyteError('ERR_HALFBYTE_DTYPE', `to: a model is cast to a float dtype, not to ${dtype}`)
  }
  for (const [path, module] of model.namedModules()) {
    const reason = module.ownCastRefusal()
    if (reason) {
      throw new HalfbyteError(
        'ERR_HALFBYTE_DTYPE',
        `to: the model cannot be cast to ${dtype}: ${path || 'it'} is a ${module.constructor.name}, ${reason}`,
      )
    }
  }
}

/** Matrices [..., m, n] that lie in memory as [..., n, m]; themselves where they do so already. */
export function laidTransposed(matrices: Tensor): Tensor {
  return tidy(() => {
    const turned = matrices.transpose(-2, -1)
    return turned.isContiguous ? matrices : turned.clone().transpose(-2, -1)
  })
}

/** As Tensor.to(), but matrices that lie in memory the other way round go on doing so. */
export function moved(tensor: Tensor, target: { dtype?: DType; device?: Device }): Tensor {
  if (tensor.ndim < 2 || tensor.isContiguous) return tensor.to(target)
  return tidy(() => {
    const turned = tensor.transpose(-2, -1)
    const value = turned.to(target)
    return value === turned ? tensor : value.transpose(-2, -1)
  })
}

/** Gives each parameter the dtype and device that `targetOf` names. Tied ones have one target and stay one tensor. */
export function relocate(
  parameters: Iterable<Parameter>,
  targetOf: (parameter: Parameter) => { dtype?: DType; device?: Device },
): void {
  const values = new Map<Tensor, Tensor>()
  for (const parameter of new Set(parameters)) {
    const target = targetOf(parameter)
    const old = parameter.tensor
    if (!old) {
      parameter.retarget(target)
      continue
    }
    const value = values.get(old) ?? noGrad(() => moved(old, target))
    values.set(old, value)
    if (value === old) continue
    const { grad } = old
    if (grad) value.grad ??= noGrad(() => moved(grad, target))
    parameter.replace(value)
  }
  for (const [old, value] of values) if (old !== value) old.dispose()
}

export function moveModule(model: Module, target: MoveTarget): void {
  const { dtype, device } = readTarget(target)
  if (dtype) checkCast(model, dtype)
  if (device && isSpread(model)) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_USAGE',
      `to: a device map has spread this model over several places; load it again to have it on ${device.name}`,
    )
  }
  const everything = [
    ...model.namedParameters({ removeDuplicate: false }),
    ...model.namedBuffers({ removeDuplicate: false }),
  ].map(([, parameter]) => parameter)
  relocate(everything, (parameter) => {
    const isCast = dtype && parameter.kind === 'parameter' && DTYPES[parameter.dtype ?? dtype].isFloat
    return { ...(isCast && { dtype }), ...(device && { device }) }
  })
  if (device) for (const module of model.modules()) module.ownMove(device)
  refreshCopies(model)
}
