/**
 * Fills a model that was built without memory from a checkpoint, tensor by tensor in the order of the files, each
 * quantised (where its layer is) as it arrives: the peak is the result and one tensor. Plain checkpoints and
 * those that bitsandbytes quantised take the same way.
 */
import { HalfbyteError } from '../errors.js'
import { FusedExperts } from '../nn/experts.js'
import { refuseSpread } from '../nn/hooks.js'
import type { Module } from '../nn/module.js'
import type { Parameter } from '../nn/parameter.js'
import { BitsAndBytesConfig, type BitsAndBytesConfigOptions } from '../quantization/config.js'
import { replaceWithQuantizedLinear, type ReplacementReport } from '../patch/replace.js'
import { keepsFp32, type OutputEmbeddings } from '../patch/skip.js'
import { defaultDevice, device as toDevice, type Device, type DeviceLike } from '../tensor/device.js'
import { DTYPES, type DType } from '../tensor/dtype.js'
import { countNonfinite } from '../tensor/ops.js'
import { keep } from '../tensor/tidy.js'
import { emitWarning } from '../warning.js'
import { assign, isFloat, isPacked, placeOf, type Assignment } from './assign.js'
import { Backlog } from './backlog.js'
import type { DeviceMap } from './device_map.js'
import { fillCopies, hookModules, Layout, placeModules } from './dispatch.js'
import { checkpointError } from './header.js'
import type { MaxMemory } from './max_memory.js'
import { DiskOffload } from './offload.js'
import { resolveDeviceMap, type DeviceMapOption } from './placement.js'
import { Checkpoint, count, list } from './source.js'

export interface LoadProgress {
  loadedBytes: number
  totalBytes: number
  /** The tensor that was read last. */
  tensor: string
}

export interface LoadOptions {
  /** How linear layers are quantised; or, with `prequantized`, how the checkpoint's are. */
  quantizationConfig?: BitsAndBytesConfig | BitsAndBytesConfigOptions | undefined
  /** The checkpoint holds quantised weights: layers are quantised exactly where it has them so. */
  prequantized?: boolean
  /** Modules that stay as they are, besides the output head. */
  modulesToNotConvert?: readonly string[] | undefined
  /** Of the parameters that are not quantised. Default: as the checkpoint has them. */
  dtype?: DType | undefined
  /** The device that all of the model goes to. Default: defaultDevice(). */
  device?: DeviceLike | undefined
  /** In the place of `device`: where the parts of the model go, by strategy or by module path. */
  deviceMap?: DeviceMapOption | undefined
  /** What each device may hold, for a strategy: { 0: '10GiB', cpu: '30GiB' }. Default: what is free. */
  maxMemory?: MaxMemory | undefined
  /** Where modules on the disk are written that the checkpoint does not have as they are needed: quantised ones. */
  offloadFolder?: string | undefined
  /** Aborting rejects with its reason and frees what was loaded. */
  signal?: AbortSignal | undefined
  onProgress?: ((progress: LoadProgress) => void) | undefined
  /** Told about tensors that the model has no use for. Default: process.emitWarning. */
  onWarning?: ((message: string) => void) | undefined
}

export interface LoadReport {
  /** What replaceWithQuantizedLinear() did. */
  replacement?: ReplacementReport
  /** Where the parts of the model are. */
  deviceMap: DeviceMap
  /** Tensors of the checkpoint that the model has no place for. */
  unexpected: string[]
  loadedBytes: number
}

export async function loadCheckpoint(
  model: Module,
  source: string | Checkpoint,
  options: LoadOptions = {},
): Promise<LoadReport> {
  options.signal?.throwIfAborted()
  refuseSpread(model, 'loadCheckpoint', 'build it anew to load it once more')
  const checkpoint = typeof source === 'string' ? Checkpoint.open(source) : source
  try {
    if (options.dtype) model.to(options.dtype)
    keepFp32(model)
    const shapes = new Map(model.namedParameters({ removeDuplicate: false }))
    const replacement = quantizeLayers(model, checkpoint, options)
    const { items, unexpected } = assign(model, checkpoint, shapes)
    const deviceMap = resolve(model, options)
    const layout = new Layout(model, deviceMap)
    const copies = placeModules(model, layout)
    const offload = new DiskOffload(model, layout, options.offloadFolder)
    model.adopt(offload)
    offload.keepTied(model)
    offload.checkFolder(options.prequantized ?? false)
    await fill(model, checkpoint, items, layout, offload, options)
    await check(model, checkpoint, offload)
    fillCopies(model, copies)
    hookModules(model, layout, (module) => offload.weightsOf(module))
    if (unexpected.length > 0) {
      const warn = options.onWarning ?? emitWarning
      warn(`${checkpoint.path}: the model has no use for ${count(unexpected, 'tensor')}: ${list(unexpected)}`)
    }
    const loadedBytes = items.reduce((sum, { info }) => sum + info.end - info.begin, 0)
    return { ...(replacement && { replacement }), deviceMap, unexpected, loadedBytes }
  } catch (error) {
    model.dispose()
    throw error
  } finally {
    if (typeof source === 'string') checkpoint.close()
  }
}

/** Parameters of modules that stay in float32. */
function keepFp32(model: Module & OutputEmbeddings): void {
  for (const [path, parameter] of model.namedParameters()) {
    const module = path.slice(0, Math.max(0, path.lastIndexOf('.')))
    if (keepsFp32(model, module)) parameter.retarget({ dtype: 'float32' })
  }
}

function resolve(model: Module, options: LoadOptions): DeviceMap {
  const { deviceMap, device, maxMemory, quantizationConfig } = options
  if (deviceMap !== undefined && device !== undefined) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_VALUE',
      'device and deviceMap were both given; a device is the deviceMap of a model that is all in one place',
    )
  }
  return resolveDeviceMap(model, deviceMap ?? toDevice(device ?? defaultDevice()), {
    maxMemory,
    offloadQuantized: quantizationConfig?.llmInt8EnableFp32CpuOffload,
  })
}

function quantizeLayers(
  model: Module,
  checkpoint: Checkpoint,
  options: LoadOptions,
): ReplacementReport | undefined {
  const given = options.quantizationConfig
  if (!given) return undefined
  const config = given instanceof BitsAndBytesConfig ? given : new BitsAndBytesConfig(given)
  if (!options.prequantized) {
    const modulesToNotConvert = options.modulesToNotConvert ?? []
    const report = replaceWithQuantizedLinear(model, config, { modulesToNotConvert })
    if (report.unmatched.length > 0) {
      const warn = options.onWarning ?? emitWarning
      warn(`the list of modules to keep names no linear layer with ${report.unmatched.join(', ')}`)
    }
    return report
  }
  // the checkpoint knows best which layers are quantised: also a head that was converted on request
  const packed = [...checkpoint.tensors.keys()]
    .filter((name) => name.endsWith('.weight') && isPacked(checkpoint, name))
    .flatMap((name) => placeOf(model, name)?.slice(0, -'.weight'.length) ?? [])
  for (const [path, module] of model.namedModules()) {
    if (module instanceof FusedExperts && isPacked(checkpoint, `${path}.down_projs.0.weight`))
      packed.push(path)
  }
  if (packed.length === 0) {
    throw checkpointError(
      checkpoint.path,
      `config.json says that the weights are quantised to ${config.loadIn4bit ? 4 : 8} bits, and none of the tensors is; ` +
        'remove quantization_config from it',
    )
  }
  const report = replaceWithQuantizedLinear(model, config, { only: packed })
  // its own config says that already
  report.skipModules = null
  return report
}

async function fill(
  model: Module,
  checkpoint: Checkpoint,
  items: readonly Assignment[],
  layout: Layout,
  offload: DiskOffload,
  { signal, onProgress }: LoadOptions,
): Promise<void> {
  const totalBytes = items.reduce((sum, { info }) => sum + info.end - info.begin, 0)
  const largest = items.reduce((most, { info }) => Math.max(most, info.end - info.begin), 0)
  const backlogs = new Map<Device, Backlog>()
  const take = async ({ path, info }: Assignment, device: Device) => {
    try {
      await model.loadParameter(path, checkpoint.tensor(info.name, device))
    } catch (error) {
      if (!(error instanceof HalfbyteError)) throw error
      throw checkpointError(info.file, `tensor ${JSON.stringify(info.name)}: ${error.message}`, error)
    }
    await offload.loaded(path, info)
  }
  // a weight that is quantised already is put together when its description has been read: others come meanwhile
  const open = new Set<Promise<void>>()
  const failures: unknown[] = []
  let loadedBytes = 0
  try {
    for (const item of items) {
      signal?.throwIfAborted()
      const { path, info } = item
      const bytes = info.end - info.begin
      const device = layout.deviceAt(path)
      const backlog = backlogs.get(device) ?? new Backlog(device, largest)
      backlogs.set(device, backlog)
      await backlog.room(bytes)
      signal?.throwIfAborted()
      const taken = take(item, device)
        .catch((error: unknown) => void failures.push(error))
        .finally(() => open.delete(taken))
      open.add(taken)
      backlog.add(bytes)
      // what is quantised here in several steps would else lie in memory beside the next tensor
      if (!offload.isEmpty || isFloat(info)) await taken
      if (failures.length > 0) break
      loadedBytes += bytes
      onProgress?.({ loadedBytes, totalBytes, tensor: info.name })
    }
  } finally {
    await Promise.all(open)
  }
  if (failures.length > 0) throw failures[0]
  await Promise.all([...backlogs.keys()].map((device) => device.synchronize()))
  signal?.throwIfAborted()
}

/** Everything has arrived, could be read, and is finite. */
async function check(model: Module, checkpoint: Checkpoint, offload: DiskOffload): Promise<void> {
  const missing = model.missingParameters()
  if (missing.length > 0) {
    throw checkpointError(checkpoint.path, `the model lacks ${count(missing, 'tensor')}: ${list(missing)}`)
  }
  const bad = await offload.nonfinite()
  const counts = [...model.namedParameters()].map(async ([path, parameter]) => {
    if (parameter.isOffloaded) return
    const value = parameter.value
    // of integers one element is read: it tells whether reading the file went well
    const probe = DTYPES[value.dtype].isFloat ? keep(countNonfinite(value)) : firstElement(value)
    const count = await probe.item().finally(() => probe.dispose())
    if (DTYPES[value.dtype].isFloat && count > 0) bad.push(`${path} (${count})`)
  })
  await Promise.all(counts)
  if (bad.length > 0) {
    throw checkpointError(
      checkpoint.path,
      `NaN or infinity in the weights: ${list(bad)}. Repair the checkpoint`,
    )
  }
  try {
    await model.checkFinite()
  } catch (error) {
    if (!(error instanceof HalfbyteError)) throw error
    throw checkpointError(checkpoint.path, error.message, error)
  }
}

function firstElement(value: Parameter['value']): Parameter['value'] {
  const flat = value.reshape(value.size)
  try {
    return keep(flat.slice(0, 0, 1))
  } finally {
    flat.dispose()
  }
}
