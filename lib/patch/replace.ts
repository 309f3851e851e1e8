/** Puts 4-bit or 8-bit layers in the place of a model's linear layers, and back. */
import { HalfbyteError } from '../errors.js'
import { FusedExperts, SplitExperts } from '../nn/experts.js'
import { refuseSpread } from '../nn/hooks.js'
import { stepRounding } from '../nn/rounding.js'
import { Conv1D, Linear } from '../nn/linear.js'
import { Linear4bit } from '../nn/linear4bit.js'
import { Linear8bit } from '../nn/linear8bit.js'
import type { Module } from '../nn/module.js'
import { packedBytes, statisticsBytes } from '../nn/weight4_parts.js'
import type { DType } from '../tensor/dtype.js'
import { BitsAndBytesConfig, type BitsAndBytesConfigOptions } from '../quantization/config.js'
import { keptByStructure, matchesModule, type Kept, type OutputEmbeddings } from './skip.js'

export interface Replacement {
  path: string
  /** Class names. */
  from: string
  to: string
  /** [outFeatures, inFeatures] */
  shape: [number, number]
  /** Of the weight, with the statistics of a packed one. */
  bytesBefore: number
  bytesAfter: number
}

export interface ReplacementReport {
  replaced: Replacement[]
  /** Linear layers that stay, and why. */
  kept: { path: string; reason: string }[]
  /** Entries of the skip lists that meant no linear layer: a misspelling, as a rule. */
  unmatched: string[]
  /** What llm_int8_skip_modules must list for Python to keep the same layers; null where it does so without a list. */
  skipModules: string[] | null
}

/** A model that knows how it is quantised. */
export interface Quantizable {
  quantizationConfig?: BitsAndBytesConfig | undefined
  replacement?: ReplacementReport | undefined
}

/** Tells a model that wants to know (has the property) how it is quantised. */
function note(model: Quantizable, config?: BitsAndBytesConfig, report?: ReplacementReport): void {
  if ('quantizationConfig' in model) model.quantizationConfig = config
  if ('replacement' in model) model.replacement = report
}

export interface ReplaceOptions {
  /** Further modules that stay as they are; see matchesModule() for how they are named. */
  modulesToNotConvert?: readonly string[]
  /** Paths of the modules that are replaced, no others, whatever skip lists and the model's structure say. */
  only?: readonly string[]
}

/** The quantised layer that `config` wants in the place of `linear`. */
export function quantizedLinear(linear: Linear, config: BitsAndBytesConfig): Linear4bit | Linear8bit {
  if (config.loadIn8bit) {
    return Linear8bit.fromLinear(linear, {
      threshold: config.llmInt8Threshold,
      hasFp16Weights: config.llmInt8HasFp16Weight,
      bnbExact: config.bnbExact,
    })
  }
  return Linear4bit.fromLinear(linear, {
    computeDtype: config.bnb4bitComputeDtype,
    quantType: config.bnb4bitQuantType,
    compressStatistics: config.bnb4bitUseDoubleQuant,
    quantStorage: config.bnb4bitQuantStorage,
    blocksize: config.blocksize,
  })
}

function bytesAfter(layer: Linear4bit | Linear8bit, config: BitsAndBytesConfig): number {
  const { outFeatures: n, inFeatures: k } = layer
  if (layer instanceof Linear8bit) return layer.hasFp16Weights ? layer.weight.nbytes : n * k + 4 * n
  return packedBytes(n, k) + statisticsBytes(n, k, config.blocksize, config.bnb4bitUseDoubleQuant)
}

/** Why a layer cannot be replaced. */
function whyNot(path: string, module: Linear | FusedExperts): string | undefined {
  if (module instanceof Linear4bit || module instanceof Linear8bit) return 'quantised already'
  return path === '' ? 'it is the model itself' : undefined
}

/** Why a layer stays as it is by the rules, of which the model's structure comes first. */
function whyKept(
  path: string,
  module: Linear | FusedExperts,
  structure: ReadonlyMap<string, Kept>,
  namedBy: string | undefined,
): Kept | undefined {
  const found = structure.get(path)
  if (found) return found
  if (namedBy) return { reason: `named by '${namedBy}'`, known: false }
  if ([Linear, Conv1D, FusedExperts].some((kind) => module.constructor === kind)) return undefined
  return { reason: `${module.constructor.name} is a class of its own`, known: true }
}

/**
 * Replaces the linear layers (Linear and Conv1D, of whatever depth) of any Module tree by quantised ones, in place, and
 * experts that lie in one tensor (FusedExperts) by such layers for each.
 * What stays: the output head (getOutputEmbeddings() where the model has it, else layers named lm_head, score,
 * classifier, ..., else a last layer that scores the rows of an embedding table), layers whose weight is tied, routers
 * of expert layers, subclasses of Linear with a forward() of their own, modules that the model keeps in float32
 * (keepInFp32Modules), and what config.llmInt8SkipModules and modulesToNotConvert name besides. Weights in memory are quantised and freed; a model without memory is prepared for
 * loading. With loadIn8bit and bnbExact the modules between round where transformers does. `await model.checkFinite()` tells
 * whether a weight held NaN. ERR_HALFBYTE_NO_LINEAR if nothing was replaced.
 */
export function replaceWithQuantizedLinear(
  model: Module & OutputEmbeddings & Quantizable,
  config: BitsAndBytesConfig | BitsAndBytesConfigOptions,
  options: ReplaceOptions = {},
): ReplacementReport {
  refuseSpread(
    model,
    'replaceWithQuantizedLinear',
    'load it again with the map and a quantizationConfig, or quantise it before dispatchModel()',
  )
  model.namePaths() // refuses a tree that is none before anything is replaced
  const settings = config instanceof BitsAndBytesConfig ? config : new BitsAndBytesConfig(config)
  const further: unknown = options.modulesToNotConvert ?? []
  if (!Array.isArray(further) || !further.every((entry) => typeof entry === 'string')) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_VALUE',
      `replaceWithQuantizedLinear: modulesToNotConvert is ${JSON.stringify(further)}, it must be a list of module names`,
    )
  }
  const entries = options.only ?? [...(settings.llmInt8SkipModules ?? []), ...further]
  const only = options.only && new Set(options.only)
  const structure = only ? new Map<string, Kept>() : keptByStructure(model)
  const report: ReplacementReport = { replaced: [], kept: [], unmatched: [], skipModules: null }
  // to name layers is to leave the automatic rules, the head's too
  let unknown = only !== undefined
  const matched = new Set<string>()
  const places = placesOf(model)
  const owners = countOwners(model)
  for (const [path, module] of [...model.namedModules()]) {
    if (!(module instanceof Linear || module instanceof FusedExperts)) continue
    const named = only
      ? [path].filter((entry) => only.has(entry))
      : entries.filter((entry) => matchesModule(entry, path))
    for (const entry of named) matched.add(entry)
    const impossible = whyNot(path, module)
    const kept = only ? undefined : whyKept(path, module, structure, named[0])
    const reason = impossible ?? (only && named.length === 0 ? 'not asked for' : kept?.reason)
    if (reason !== undefined) {
      report.kept.push({ path, reason })
      unknown ||= !impossible && kept?.known === false
      continue
    }
    if (module instanceof FusedExperts) {
      report.replaced.push(...replaceExperts(places, path, module, settings))
      continue
    }
    const bytesBefore = module.weight.nbytes
    const layer = quantizedLinear(module, settings)
    replaceEverywhere(places, module, layer)
    // a weight that is tied, as only `only` replaces it, lives on with the last that has it
    const { identity } = module.weight
    const left = owners.get(identity)! - 1
    owners.set(identity, left)
    if (left === 0) module.weight.dispose()
    report.replaced.push({
      path,
      from: module.constructor.name,
      to: layer.constructor.name,
      shape: [module.outFeatures, module.inFeatures],
      bytesBefore,
      bytesAfter: bytesAfter(layer, settings),
    })
  }
  if (settings.loadIn8bit && settings.bnbExact) roundInSteps(model, true)
  model.namePaths()
  report.unmatched = entries.filter((entry) => !matched.has(entry))
  if (unknown) report.skipModules = report.kept.map(({ path }) => path)
  if (report.replaced.length === 0) {
    const why = report.kept.map(({ path, reason }) => `${path || 'the model'}: ${reason}`)
    throw new HalfbyteError(
      'ERR_HALFBYTE_NO_LINEAR',
      `replaceWithQuantizedLinear: nothing to replace in ${model.constructor.name}` +
        (why.length > 0 ? `; kept were\n  ${why.join('\n  ')}` : ': it has no linear layers'),
    )
  }
  note(model, settings, report)
  return report
}

/** Tells what lies between the quantised layers whether to round as transformers does. */
function roundInSteps(model: Module, exact: boolean): void {
  for (const module of stepRounding(model)) if (!(module instanceof Linear8bit)) module.bnbExact = exact
}

/** Puts layers in few bits in the place of experts that lie in one tensor; one entry of the report for each. */
function replaceExperts(
  places: Places,
  path: string,
  fused: FusedExperts,
  config: BitsAndBytesConfig,
): Replacement[] {
  const before = new Map<Linear, number>()
  const split = new SplitExperts(fused, (view) => {
    const layer = quantizedLinear(view, config)
    before.set(layer, view.weight.nbytes)
    return layer
  })
  replaceEverywhere(places, fused, split)
  fused.dispose()
  return [...split.namedModules(path)].flatMap(([at, layer]) =>
    layer instanceof Linear4bit || layer instanceof Linear8bit
      ? {
          path: at,
          from: fused.constructor.name,
          to: layer.constructor.name,
          shape: [layer.outFeatures, layer.inFeatures],
          bytesBefore: before.get(layer)!,
          bytesAfter: bytesAfter(layer, config),
        }
      : [],
  )
}

/** The parents of each module, and what they call it. */
type Places = ReadonlyMap<Module, readonly [Module, string][]>

function placesOf(model: Module): Places {
  const places = new Map<Module, [Module, string][]>()
  for (const parent of model.modules()) {
    for (const [name, child] of parent.namedChildren()) {
      const known = places.get(child)
      if (known) known.push([parent, name])
      else places.set(child, [[parent, name]])
    }
  }
  return places
}

/** How many modules have each parameter. */
function countOwners(model: Module): Map<object, number> {
  const owners = new Map<object, number>()
  for (const module of model.modules()) {
    for (const [, { identity }] of module.ownParameters())
      owners.set(identity, (owners.get(identity) ?? 0) + 1)
  }
  return owners
}

/** A module may be a child in several places; it stays one module. */
function replaceEverywhere(places: Places, from: Module, to: Module): void {
  for (const [parent, name] of places.get(from) ?? []) parent.setChild(name, to)
}

/**
 * Puts dense layers with the dequantised weights back in the place of quantised ones, in place. Default dtype: that of
 * each weight before it was quantised. Returns the paths. ERR_HALFBYTE_NO_LINEAR if nothing was quantised.
 */
export function dequantize(model: Module & Quantizable, options: { dtype?: DType } = {}): string[] {
  refuseSpread(model, 'dequantize', 'load it again without one, dequantise it, and then dispatchModel()')
  const paths: string[] = []
  const places = placesOf(model)
  for (const [path, module] of [...model.namedModules()]) {
    if (module instanceof SplitExperts && path !== '') {
      const fused = module.fuse(
        (layer) => (layer as Linear4bit).dequantizeWeight(options.dtype),
        options.dtype,
      )
      replaceEverywhere(places, module, fused)
      paths.push(...[...module.namedModules(path)].flatMap(([at, m]) => (m instanceof Linear ? at : [])))
      module.dispose()
    }
  }
  for (const [path, module] of [...model.namedModules()]) {
    if (!(module instanceof Linear4bit || module instanceof Linear8bit) || path === '') continue
    const { inFeatures, outFeatures, transposed } = module
    const empty = { bias: false, device: 'meta', dtype: options.dtype } as const
    const dense = new (transposed ? Conv1D : Linear)(inFeatures, outFeatures, empty)
    if (module.weight.isLoaded) {
      const weight = module.dequantizeWeight(options.dtype)
      dense.weight.replace(transposed ? weight.transpose(0, 1) : weight)
      if (transposed) weight.dispose()
    }
    dense.weight.requiresGrad = module.weight.requiresGrad
    dense.bias = module.bias
    dense.training = module.training
    replaceEverywhere(places, module, dense)
    module.bias = null // it lives on in the dense layer
    module.dispose()
    paths.push(path)
  }
  if (paths.length === 0) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_NO_LINEAR',
      `dequantize: ${model.constructor.name} has no quantised layers`,
    )
  }
  roundInSteps(model, false)
  model.namePaths()
  note(model)
  return paths
}
