/** On the disk: weights that lie in memory the other way round than in files (GPT-2), and all experts in one tensor. */
import { join } from 'node:path'
import {
  AutoModelForCausalLM,
  CausalLM,
  ConfigReader,
  devices,
  getMemoryFootprint,
  getTrueFootprint,
  type BitsAndBytesConfigOptions,
  type Device,
  type FromPretrainedOptions,
} from '../../lib'
import { readSpec } from '../../lib/models/families'
import { results } from '../support/causal_lm'
import { temporaryFolder } from '../support/files'
import { allocatedMemory, baselineMemory } from '../support/memory'

const root = temporaryFolder()
const layers = 4

const gpt2 = { model_type: 'gpt2', n_embd: 256, n_head: 4, n_layer: layers, n_positions: 64, vocab_size: 300 }
const gptOss = {
  model_type: 'gpt_oss',
  hidden_size: 128,
  intermediate_size: 160,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  head_dim: 32,
  num_hidden_layers: layers,
  num_local_experts: 6,
  num_experts_per_tok: 2,
  vocab_size: 300,
  max_position_embeddings: 64,
  sliding_window: 16,
  rms_norm_eps: 1e-5,
  rope_parameters: { rope_type: 'default', rope_theta: 10000 },
  layer_types: Array.from({ length: layers }, (_, i) => (i % 2 ? 'full_attention' : 'sliding_attention')),
  attention_bias: true,
  tie_word_embeddings: false,
}
const families: [string, Record<string, unknown>, string][] = [
  ['gpt2', gpt2, 'transformer.h'],
  ['gpt-oss', gptOss, 'model.layers'],
]
const forms: [string, BitsAndBytesConfigOptions | undefined, FromPretrainedOptions['dtype']][] = [
  ['float32', undefined, 'float32'],
  ['bfloat16', undefined, 'bfloat16'],
  ['nf4', { loadIn4bit: true, bnb4bitQuantType: 'nf4' }, 'float32'],
  ['int8', { loadIn8bit: true }, 'float32'],
]

/** A folder with a model of random weights, made on first use. */
const folders = new Map<string, Promise<string>>()
function folderOf(name: string, config: Record<string, unknown>): Promise<string> {
  const make = async () => {
    const reader = new ConfigReader(config, 'config.json')
    using model = new CausalLM(readSpec(reader), reader).to('cpu')
    const folder = join(root, name)
    await model.savePretrained(folder)
    return folder
  }
  if (!folders.has(name)) folders.set(name, make())
  return folders.get(name)!
}

/** Bytes of a layer as it computes, and of all that is not in layers. */
function sizes(whole: CausalLM) {
  const layer = Math.max(...[...whole.model.layers].map((each) => getTrueFootprint(each)))
  const inLayers = [...whole.model.layers].reduce((sum, each) => sum + getTrueFootprint(each), 0)
  return { layer, rest: getTrueFootprint(whole) - inLayers }
}

async function peakOf(device: Device, run: () => Promise<unknown>): Promise<number> {
  const before = await baselineMemory(device)
  await run()
  return device.memoryUsage().peak - before
}

describe.each(devices())('running on %s', (device) => {
  describe.each(families)('%s', (family, config, layersPath) => {
    it.each(forms)(
      '%s: on the disk as other weights, with the same results',
      async (form, quantization, dtype) => {
        const folder = await folderOf(family, config)
        const quantizationConfig = quantization && { ...quantization, llmInt8EnableFp32CpuOffload: true }
        const offloadFolder = join(root, `${family}-${form}-${device.name.replace(':', '')}`)
        const deviceMap = { '': device.name, [layersPath]: 'disk' }
        using whole = await AutoModelForCausalLM.fromPretrained(folder, { device, dtype, quantizationConfig })
        const wanted = await results(whole)
        const { layer, rest } = sizes(whole)
        const inMemory = await peakOf(device, () => results(whole))

        const before = await baselineMemory(device)
        const options = { deviceMap, dtype, quantizationConfig, offloadFolder }
        using model = await AutoModelForCausalLM.fromPretrained(folder, options)
        for (const [path, parameter] of model.model.layers.namedParameters()) {
          if (parameter.nbytes >= 64 << 10) expect([path, parameter.tensor]).toEqual([path, undefined])
        }
        // of the layers only what is small stays: norms, biases, statistics
        expect((await allocatedMemory(device)) - before).toBeLessThan(rest + layers * 0.2 * layer)
        expect(getMemoryFootprint(model)).toBe(getMemoryFootprint(whole))

        const found = await results(model)
        expect(found).toEqual(wanted)
        expect(await results(model)).toEqual(wanted)
        // two layers, and what is converted or turned round on the way: here all of one, as the file has it
        const offloaded = await peakOf(device, () => results(model))
        expect(offloaded - inMemory).toBeLessThan((form === 'bfloat16' ? 4.2 : 3.1) * layer)
      },
    )
  })

  it('turns a large weight round in pieces', async () => {
    const wide = { ...gpt2, n_embd: 64, n_inner: 72_000, n_layer: 1 }
    const folder = await folderOf('wide', wide)
    // more than a piece, and no multiple of it
    expect(64 * 72_000 * 4).toBeGreaterThan(17 << 20)
    using whole = await AutoModelForCausalLM.fromPretrained(folder, { device })
    const deviceMap = { '': device.name, 'transformer.h': 'disk' }
    using model = await AutoModelForCausalLM.fromPretrained(folder, { deviceMap })
    expect(await results(model)).toEqual(await results(whole))
  })
})
