/** What may be done to a model that a device map has spread: each either works as on one device, or is refused whole. */
import { join } from 'node:path'
import {
  AutoModelForCausalLM,
  dequantize,
  devices,
  dispatchModel,
  Linear,
  Linear4bit,
  loadCheckpoint,
  ModuleList,
  replaceWithQuantizedLinear,
  Sequential,
  Tensor,
  type CausalLM,
  type FromPretrainedOptions,
  type HalfbyteError,
} from '../../lib'
import { logits } from '../support/causal_lm'
import { thrown } from '../support/errors'
import { temporaryFolder } from '../support/files'
import { allocatedMemory, baselineMemory } from '../support/memory'
import { relativeError } from '../support/reference'
import { writeTinyModel } from '../support/tiny_model'

const root = temporaryFolder()
const config = { hidden_size: 256, intermediate_size: 512, num_hidden_layers: 3, vocab_size: 300 }
const folder = writeTinyModel(join(root, 'tied'), { ...config, tie_word_embeddings: true })

const quantizationConfig = { loadIn4bit: true, llmInt8EnableFp32CpuOffload: true } as const
const layer = 'model.layers.1'
/** Elsewhere: layer 1 and the head, which has a copy of the embeddings' weight, or is tied to them on the disk. */
const placements = (a: string): [string, FromPretrainedOptions][] => {
  const spread = { '': a, [layer]: 'cpu:1', lm_head: 'cpu:1' }
  const disk = { '': a, [layer]: 'disk', lm_head: 'disk', 'model.embed_tokens': 'disk' }
  return [
    ['spread', { deviceMap: spread }],
    ['disk', { deviceMap: disk }],
    ['spread in 4 bits', { deviceMap: spread, quantizationConfig }],
    ['disk in 4 bits', { deviceMap: disk, quantizationConfig, offloadFolder: join(root, 'offload') }],
  ]
}

const linear = () => new Linear(512, 256, { bias: false, device: 'meta' })
const filled = (...shape: number[]) => Tensor.full(shape, 0.01, 'float32', 'cpu')
function down(model: CausalLM): Linear {
  const found = model.getSubmodule(`${layer}.mlp.down_proj`)
  if (found instanceof Linear) return found
  throw new Error('down_proj is no layer')
}

interface Row {
  /** Of the models where it works; everywhere else it is refused with `code` and `message`. */
  works?: RegExp
  code?: RegExp
  message?: RegExp
  run: (model: CausalLM) => unknown
}

const spreadMessage = /a device map has spread this model.*; .*(load|build) it/
const diskMessage = /lies on the disk/
const rows: Record<string, Row> = {
  'loadParameter of a layer': {
    works: /^spread/,
    message: /up_proj.* lies on the disk and cannot take other weights; load the model again/,
    run: (model) => model.loadParameter(`${layer}.mlp.up_proj.weight`, filled(512, 256)),
  },
  'loadParameter of what stays in memory': {
    works: /./,
    run: (model) => model.loadParameter(`${layer}.input_layernorm.weight`, filled(256)),
  },
  'loadParameter of a tied weight': {
    works: /^spread/,
    message: diskMessage,
    run: (model) => model.loadParameter('model.embed_tokens.weight', filled(300, 256)),
  },
  'loadParameter of the other name of a tied weight': {
    works: /^spread/,
    message: diskMessage,
    run: (model) => model.loadParameter('lm_head.weight', filled(300, 256)),
  },
  'loadParameter of a wrong shape': {
    code: /ERR_HALFBYTE_STATE_DICT/,
    message: /input_layernorm.weight has shape \[3\], the model has \[256\]/,
    run: (model) => model.loadParameter(`${layer}.input_layernorm.weight`, filled(3)),
  },
  'loadStateDict of a layer': {
    works: /^spread/,
    message: /loadStateDict: .*up_proj lies on the disk/,
    run: async (model) => {
      using weight = filled(512, 256)
      using norm = filled(256)
      const state = new Map([
        [`model.layers.0.input_layernorm.weight`, norm],
        [`${layer}.mlp.up_proj.weight`, weight],
      ])
      await model.loadStateDict(state, { strict: false })
    },
  },
  setChild: {
    message: /^setChild: a device map/,
    run: (model) => model.getSubmodule(`${layer}.mlp`).setChild('down_proj', linear()),
  },
  'setChild of a list': {
    message: /^setChild: a device map/,
    run: (model) => model.model.layers.setChild('1', model.model.layers.at(0)!),
  },
  push: {
    message: /^push: a device map/,
    run: (model) => model.model.layers.push(model.model.layers.at(0)!),
  },
  setSubmodule: {
    message: /^setSubmodule: a device map/,
    run: (model) => model.setSubmodule(`${layer}.mlp.down_proj`, linear()),
  },
  'to a device': { run: (model) => model.to('cpu:2') },
  'to a device, of a layer': { run: (model) => model.model.layers.at(1)!.to('cpu:2') },
  'to a device and a dtype': {
    code: /ERR_HALFBYTE_(USAGE|DTYPE)/,
    message: /a device map has spread this model|cannot be cast to bfloat16/,
    run: (model) => model.to({ device: 'cpu:2', dtype: 'bfloat16' }),
  },
  'to a dtype': {
    works: /^(spread|disk)$/,
    code: /ERR_HALFBYTE_DTYPE/,
    message: /cannot be cast to bfloat16: .* is a Linear4bit/,
    run: (model) => model.to('bfloat16'),
  },
  'to a dtype, of a norm': {
    works: /./,
    run: (model) => model.getSubmodule(`${layer}.input_layernorm`).to('float32'),
  },
  replaceWithQuantizedLinear: { run: (model) => replaceWithQuantizedLinear(model, quantizationConfig) },
  'replaceWithQuantizedLinear of a layer': {
    run: (model) => replaceWithQuantizedLinear(model.model.layers.at(1)!, quantizationConfig),
  },
  dequantize: { run: (model) => dequantize(model) },
  'dequantize of a layer': { run: (model) => dequantize(model.model.layers.at(1)!) },
  'the method dequantize': { run: (model) => model.dequantize() },
  loadCheckpoint: { run: (model) => loadCheckpoint(model, folder) },
  dispatchModel: { run: (model) => dispatchModel(model, { '': 'cpu' }) },
  'a copy of a layer': {
    works: /^spread/,
    message: diskMessage,
    run: (model) => down(model).copyTo(model.device!).dispose(),
  },
  'the values of a layer': {
    works: /^spread/,
    message: diskMessage,
    run: (model) => {
      const layer = down(model)
      const made = layer instanceof Linear4bit ? layer.dequantizeWeight() : Linear4bit.fromLinear(layer)
      made.dispose()
    },
  },
  stateDict: {
    works: /./,
    run: async (model) => {
      for (const tensor of (await model.stateDict()).values()) tensor.dispose()
    },
  },
  savePretrained: { works: /./, run: (model) => model.savePretrained(join(root, 'saved')) },
  'train, eval and apply': {
    works: /./,
    run: (model) =>
      model
        .train()
        .eval()
        .apply(() => undefined),
  },
}

describe.each(devices())('on %s', (device) => {
  describe.each(placements(device.name))('%s', (kind, options) => {
    it.each(Object.entries(rows))('%s', async (_, { works, code, message, run }) => {
      const before = await baselineMemory(device)
      {
        using model = await AutoModelForCausalLM.fromPretrained(folder, options)
        const wanted = await logits(model)
        const attempt = async () => run(model)
        const error = (await attempt().catch((reason: unknown) => reason)) as HalfbyteError | undefined
        if (works?.test(kind)) {
          if (error instanceof Error) throw error
          const { deviceMap: _map, offloadFolder: _folder, ...rest } = options
          using whole = await AutoModelForCausalLM.fromPretrained(folder, { ...rest, device })
          await run(whole)
          const [ours, theirs] = [await logits(model), await logits(whole)]
          // a GPU and the CPU beside it add in another order than one of them
          if (device.type === 'cuda' && kind.startsWith('spread'))
            expect(relativeError(ours, theirs)).toBeLessThan(model.dtype === 'bfloat16' ? 2e-2 : 1e-5)
          else expect(ours).toEqual(theirs)
        } else {
          expect(error?.name).toBe('HalfbyteError')
          expect(error!.code).toMatch(code ?? /ERR_HALFBYTE_USAGE/)
          expect(error!.message).toMatch(message ?? spreadMessage)
          expect(await logits(model)).toEqual(wanted)
          const [parameter] = model.parameters()
          expect(parameter!.dtype).toBe('float32')
        }
      }
      expect(await allocatedMemory(device)).toBeLessThanOrEqual(before)
    })
  })
})

it.each<[string, ModuleList | Sequential]>([
  ['a list', new ModuleList([new Linear(2, 2)])],
  ['a sequence', new Sequential(new Linear(2, 2))],
])('%s has only the children that it has', (_, list) => {
  for (const name of ['1', '-1', 'x', '']) {
    const error = thrown(() => list.setChild(name, new Linear(2, 2)))
    expect(error.code).toBe('ERR_HALFBYTE_VALUE')
    expect(error.message).toMatch(/of 1 has no child/)
  }
  list.dispose()
})
