/** halfbyte inspect: a table of the modules of a model, with kinds, shapes and bytes. */
import type { CausalLM } from '../../models/index.js'
import { Linear } from '../../nn/linear.js'
import { Linear4bit } from '../../nn/linear4bit.js'
import { Linear8bit } from '../../nn/linear8bit.js'
import type { Module } from '../../nn/module.js'
import { getMemoryFootprint, getTrueFootprint } from '../../patch/footprint.js'
import type { Command } from '../command.js'
import { describeWeights, loadModel } from '../load.js'
import { modelOptions } from '../model_options.js'
import { commonOptions } from '../options.js'
import { print, printJson } from '../output.js'
import { formatBytes, formatTable } from '../table.js'

export interface ModuleRow {
  path: string
  kind: string
  shape: readonly number[]
  dtype: string
  /** Of parameters and statistics; a tied weight counts where it comes first. */
  bytes: number
  /** Why a linear layer was not quantised. */
  note?: string
}

function dtypeOf(module: Module): string {
  if (module instanceof Linear4bit) return module.quantType
  if (module instanceof Linear8bit) return 'int8'
  const [first] = [...module.ownParameters()]
  return first?.[1].dtype ?? 'none'
}

/** Modules that hold tensors of their own, in the order of the model. */
function moduleRows(model: CausalLM): ModuleRow[] {
  const reasons = new Map(model.replacement?.kept.map(({ path, reason }) => [path, reason]))
  const counted = new Set<object>()
  const rows: ModuleRow[] = []
  for (const [path, module] of model.namedModules()) {
    const own = [...module.ownParameters()]
    if (own.length === 0) continue
    let bytes = 0
    for (const [, parameter] of own) {
      if (!counted.has(parameter.identity)) bytes += parameter.nbytes
      counted.add(parameter.identity)
    }
    for (const [, statistic] of module.ownStatistics()) bytes += statistic.nbytes
    const shape = module instanceof Linear ? [module.outFeatures, module.inFeatures] : own[0]![1].shape
    const note = reasons.get(path)
    rows.push({
      path,
      kind: module.constructor.name,
      shape,
      dtype: dtypeOf(module),
      bytes,
      ...(note && { note }),
    })
  }
  return rows
}

export const inspect: Command = {
  name: 'inspect',
  summary: 'Modules, kinds, shapes and bytes of a model, as it is or as it would be quantised.',
  arguments: 'DIR',
  count: [1, 1],
  options: [
    ['Model', modelOptions],
    ['Options', commonOptions],
  ],
  async run(invocation) {
    const { positionals, flags } = invocation
    const { model } = await loadModel(positionals[0]!, invocation)
    const modules = moduleRows(model)
    const parameters = model.numParameters()
    const [footprint, total] = [getMemoryFootprint(model), getTrueFootprint(model)]
    const weights = describeWeights(model)
    if (flags.switch('json')) {
      printJson({
        model: positionals[0],
        family: model.spec.modelType,
        weights,
        parameters,
        footprint,
        total,
        modules,
      })
    } else {
      const rows = modules.map(({ path, kind, shape, dtype, bytes, note }) => [
        path,
        kind,
        shape.join(' x '),
        dtype,
        bytes,
        note ?? '',
      ])
      print(formatTable(['module', 'kind', 'shape', 'dtype', 'bytes', ''], rows))
      print(
        `\n${model.spec.modelType}, ${parameters.toLocaleString('en')} parameters, ${weights}: ` +
          `${formatBytes(total)}, of it ${formatBytes(total - footprint)} statistics of quantised weights`,
      )
    }
    model.dispose()
  },
}
