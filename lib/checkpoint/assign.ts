/** Which tensor of a checkpoint belongs where in a model, by names and shapes alone. */
import { SplitExperts } from '../nn/experts.js'
import type { Module } from '../nn/module.js'
import type { Parameter } from '../nn/parameter.js'
import { DTYPES } from '../tensor/dtype.js'
import { checkpointError, type TensorInfo } from './header.js'
import { FROM_SAFETENSORS } from './safetensors.js'
import { count, list, type Checkpoint } from './source.js'

/** Tensors that older checkpoints carry though they follow from the config. */
const DERIVED = /(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|(attn|attention)\.(bias|masked_bias))$/

/** What a model may say about the names in its checkpoints. */
interface Prefixed {
  /** Default 'model'. */
  baseModelPrefix?: string
}

/** A tensor of the checkpoint and its name in the model. */
export interface Assignment {
  info: TensorInfo
  path: string
}

/** The model's name for a tensor; the base model's prefix may be there or not, on either side. */
export function placeOf(model: Module & Prefixed, name: string): string | undefined {
  const prefix = `${model.baseModelPrefix ?? 'model'}.`
  const names = [name, `${prefix}${name}`, ...(name.startsWith(prefix) ? [name.slice(prefix.length)] : [])]
  return names.find((candidate) => model.acceptsParameter(candidate))
}

/** Whether the checkpoint has a weight in quantised form. */
export function isPacked(checkpoint: Checkpoint, name: string): boolean {
  if (!checkpoint.has(name)) return false
  return checkpoint.has(`${name}.absmax`) || ['U8', 'I8'].includes(checkpoint.info(name).dtype)
}

/** Pairs tensors and places; one ERR_HALFBYTE_CHECKPOINT for all that does not fit. `shapes`: of the dense model. */
export function assign(
  model: Module,
  checkpoint: Checkpoint,
  shapes: ReadonlyMap<string, Parameter>,
): { items: Assignment[]; unexpected: string[] } {
  const found = new Map<string, TensorInfo>()
  const unexpected: string[] = []
  for (const [name, info] of checkpoint.tensors) {
    const path = placeOf(model, name)
    if (path === undefined) {
      if (!DERIVED.test(name)) unexpected.push(name)
    } else if (!found.has(path) || path === name) found.set(path, info)
  }
  // experts that were taken apart have other names than before; they are missed when all is loaded
  const split = [...model.namedModules()].flatMap(([path, module]) =>
    module instanceof SplitExperts ? `${path}.` : [],
  )
  // of tied names the first one counts
  const taken = new Set<object>()
  const missing = new Map<object, string>()
  for (const [path, parameter] of shapes) {
    if (taken.has(parameter.identity)) found.delete(path)
    else if (found.has(path)) taken.add(parameter.identity)
    else if (split.some((prefix) => path.startsWith(prefix))) continue
    else if (parameter.persistent && !missing.has(parameter.identity)) missing.set(parameter.identity, path)
  }
  const absent = [...missing].filter(([identity]) => !taken.has(identity)).map(([, path]) => path)
  const complaints: string[] = []
  if (absent.length > 0) {
    complaints.push(`the model lacks ${count(absent, 'tensor')}: ${list(absent)}`)
    if (unexpected.length > 0)
      complaints.push(`${unexpected.length} are not the model's: ${list(unexpected)}`)
  }
  const wrong = [...found].flatMap(([path, info]) => mismatch(checkpoint, path, info, shapes.get(path)))
  if (wrong.length > 0) complaints.push(`config.json and the tensors disagree: ${list(wrong, 4)}`)
  if (complaints.length > 0) throw checkpointError(checkpoint.path, complaints.join('; '))

  const fileOrder = new Map(checkpoint.files.map((file, i) => [file.path, i]))
  // of the names of a tied tensor the first one stands for it
  const first = new Map<object, string>()
  for (const [path, { identity }] of shapes) if (!first.has(identity)) first.set(identity, path)
  const items = [...found].map(([path, info]) => {
    const identity = shapes.get(path)?.identity
    return { path: (identity && first.get(identity)) ?? path, info }
  })
  items.sort(
    (a, b) => fileOrder.get(a.info.file)! - fileOrder.get(b.info.file)! || a.info.begin - b.info.begin,
  )
  return { items, unexpected }
}

export function isFloat({ dtype }: TensorInfo): boolean {
  const ours = FROM_SAFETENSORS[dtype]
  return ours !== undefined && DTYPES[ours].isFloat
}

function mismatch(
  checkpoint: Checkpoint,
  path: string,
  info: TensorInfo,
  place: Parameter | undefined,
): string[] {
  // packed weights have shapes of their own, which their layers check
  const scb = info.name.replace(/weight$/, 'SCB')
  if (!place || checkpoint.has(`${info.name}.absmax`)) return []
  if (info.dtype === 'I8' && checkpoint.has(scb)) return []
  const same = place.shape.length === info.shape.length && place.shape.every((n, i) => n === info.shape[i])
  if (!same)
    return [`${path} is ${info.dtype} [${info.shape.join(', ')}], the model has [${place.shape.join(', ')}]`]
  return isFloat(info) ? [] : [`${path} is ${info.dtype}, the model has floating-point weights`]
}
