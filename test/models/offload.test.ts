/** Models with parts on the host beside their device, and on the disk: quantised as everywhere, in memory when they run. */
import { availableParallelism } from 'node:os'
import { existsSync, readdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import {
  devices,
  getMemoryFootprint,
  getTrueFootprint,
  Linear4bit,
  Tensor,
  type CausalLM,
  type DecoderLayer,
  type GatedMlp,
} from '../../lib'
import { ids, load, logits } from '../support/causal_lm'
import { rejection, thrown } from '../support/errors'
import { temporaryFolder } from '../support/files'
import { allocatedMemory, baselineMemory } from '../support/memory'
import { allowed, config, forms } from '../support/offload'
import { relativeError } from '../support/reference'
import { tinyWeights, writeTinyModel } from '../support/tiny_model'

const root = temporaryFolder()
const folder = writeTinyModel(join(root, 'plain'), config)

/** The MLP of a layer of a Llama. */
const mlpOf = (model: CausalLM, layer: number) =>
  (model.model.layers.at(layer) as DecoderLayer).mlp as GatedMlp

describe.each(devices())('parts on the disk, running on %s', (device) => {
  const main = device.name

  describe.each(forms)('%s', (form, quantizationConfig) => {
    const offloadFolder = join(root, `offload-${form.replace(' ', '-')}-${main.replace(':', '')}`)
    const maps: [string, Record<string, string>][] = [
      ['two layers', { '': main, 'model.layers.1': 'disk', 'model.layers.3': 'disk' }],
      ['everything', { '': 'disk' }],
      [
        'parts of layers, embeddings and head',
        {
          '': main,
          'model.embed_tokens': 'disk',
          lm_head: 'disk',
          'model.layers.2.mlp': 'disk',
          'model.layers.0.self_attn.q_proj': 'disk',
        },
      ],
    ]
    // where nothing else is named, 'disk' runs on the CPU
    const usable = maps.filter(([name]) => name !== 'everything' || main === 'cpu')

    it.each(usable)('%s: the results of a model in memory', async (_, deviceMap) => {
      using whole = await load(folder, { device, quantizationConfig })
      using model = await load(folder, { deviceMap, quantizationConfig, offloadFolder })
      expect(model.hfDeviceMap).toEqual(deviceMap)
      const wanted = await logits(whole)
      expect(await logits(model)).toEqual(wanted)
      expect(await logits(model)).toEqual(wanted)
      const options = { maxNewTokens: 8, minNewTokens: 8 }
      const [ours, theirs] = [await model.generate(ids, options), await whole.generate(ids, options)]
      expect(ours.tokenIds).toEqual(theirs.tokenIds)
      expect(await model.loss(ids)).toBe(await whole.loss(ids))
      expect(getMemoryFootprint(model)).toBe(getMemoryFootprint(whole))
      expect(model.numParameters()).toBe(whole.numParameters())
    })

    it('keeps out of memory what is on the disk, but for two modules at a time', async () => {
      const layers = Array.from({ length: 5 }, (_, i) => `model.layers.${i}`)
      const deviceMap = { '': main, ...Object.fromEntries(layers.map((path) => [path, 'disk'])) }
      using whole = await load(folder, { device, quantizationConfig })
      const all = getTrueFootprint(whole)
      const layer = getTrueFootprint(whole.model.layers.at(0)!)
      const before = await baselineMemory(device)
      using model = await load(folder, { deviceMap, quantizationConfig, offloadFolder })
      expect((await allocatedMemory(device)) - before).toBeLessThan(all - 4 * layer)
      expect(getTrueFootprint(model)).toBeLessThan(all - 4 * layer)
      expect(getMemoryFootprint(model)).toBe(getMemoryFootprint(whole))
      const probe = mlpOf(model, 2).down_proj
      expect(probe.weight.tensor).toBeUndefined()
      const resident = await baselineMemory(device)
      for (let i = 0; i < 3; i++) await logits(model)
      // each thread of the CPU has a workspace of its own
      const working = 16 * 300 * 4 * 20 + 200_000 + availableParallelism() * 65536
      // a layer of the GPU's is unpacked beside its packed form while it is put in order
      expect(device.memoryUsage().peak - resident).toBeLessThan(2.6 * layer + working)
      expect(probe.weight.tensor).toBeUndefined()
      expect(thrown(() => probe.weight.value).code).toBe('ERR_HALFBYTE_USAGE')
      expect(thrown(() => probe.weight.value).message).toMatch(/mlp.down_proj.weight .* lies on the disk/)
    })

    it('leaves nothing behind, and saves what others save', async () => {
      const deviceMap = { '': main, 'model.layers.1': 'disk', lm_head: 'disk' }
      const before = await baselineMemory(device)
      {
        using model = await load(folder, { deviceMap, quantizationConfig, offloadFolder })
        if (existsSync(offloadFolder)) expect(readdirSync(offloadFolder)).toEqual([])
        const wanted = await logits(model)
        const out = join(root, `saved-${form.replace(' ', '-')}-${main.replace(':', '')}`)
        await model.savePretrained(out)
        using back = await load(out, { device })
        expect(await logits(back)).toEqual(wanted)
        // a checkpoint that is quantised needs no folder: the weights are read where they are
        using again = await load(out, { deviceMap, ...(quantizationConfig && { quantizationConfig }) })
        expect(await logits(again)).toEqual(wanted)
      }
      expect(await allocatedMemory(device)).toBeLessThanOrEqual(before)
    })
  })

  it('converts on the way in', async () => {
    const deviceMap = { '': main, 'model.layers.1': 'disk' }
    using whole = await load(folder, { device, dtype: 'bfloat16' })
    using model = await load(folder, { deviceMap, dtype: 'bfloat16' })
    expect(model.computeDtype).toBe('bfloat16')
    expect(await logits(model)).toEqual(await logits(whole))
  })

  it('keeps in memory what is tied to something in memory', async () => {
    const path = writeTinyModel(join(root, `tied-${main.replace(':', '')}`), {
      ...config,
      tie_word_embeddings: true,
    })
    using whole = await load(path, { device })
    for (const deviceMap of [
      { '': main, lm_head: 'disk' },
      { '': main, 'model.embed_tokens': 'disk' },
      { '': main, 'model.embed_tokens': 'disk', lm_head: 'disk' },
    ]) {
      using model = await load(path, { deviceMap })
      expect(await logits(model)).toEqual(await logits(whole))
      expect(model.lm_head.weight).toBe(model.model.embed_tokens.weight)
      expect(model.lm_head.weight.tensor === undefined).toBe(Object.keys(deviceMap).length === 3)
    }
  })

  it('needs a folder for what is quantised here', async () => {
    const deviceMap = { '': main, 'model.layers.1': 'disk' }
    const quantizationConfig = { loadIn8bit: true, ...allowed }
    const error = await rejection(load(folder, { deviceMap, quantizationConfig }))
    expect(error.code).toBe('ERR_HALFBYTE_VALUE')
    expect(error.message).toMatch(
      /model.layers.1 is on the disk and quantised while it is loaded; say with offloadFolder/,
    )
    const file = join(root, `file-${main.replace(':', '')}`)
    writeFileSync(file, '')
    const before = await baselineMemory(device)
    const refused = await rejection(load(folder, { deviceMap, quantizationConfig, offloadFolder: file }))
    expect(refused.code).toBe('ERR_HALFBYTE_IO')
    expect(refused.message).toContain(file)
    expect(await allocatedMemory(device)).toBeLessThanOrEqual(before)
  })

  it('lets loads that run at once share a folder', async () => {
    const offloadFolder = join(root, `shared-${main.replace(':', '')}`)
    const deviceMap = { '': main, 'model.layers.1': 'disk', 'model.layers.3': 'disk' }
    const configs = (['nf4', 'fp4'] as const).map((bnb4bitQuantType) => ({
      loadIn4bit: true,
      bnb4bitQuantType,
      ...allowed,
    }))
    const models = await Promise.all(
      configs.map((quantizationConfig) => load(folder, { deviceMap, quantizationConfig, offloadFolder })),
    )
    expect(readdirSync(offloadFolder)).toEqual([])
    for (const [i, model] of models.entries()) {
      using whole = await load(folder, { device, quantizationConfig: configs[i]! })
      expect(await logits(model)).toEqual(await logits(whole))
      model.dispose()
    }
  })

  it.each([['/proc/nope/x'], [7 as unknown as string]])('refuses the folder %p', async (offloadFolder) => {
    const deviceMap = { '': main, 'model.layers.1': 'disk' }
    const quantizationConfig = { loadIn8bit: true, ...allowed }
    const error = await rejection(load(folder, { deviceMap, quantizationConfig, offloadFolder }))
    expect(error.code).toMatch(/ERR_HALFBYTE_(IO|VALUE)/)
    expect(error.message).toMatch(/\/proc\/nope|7 is not the path of a folder/)
  })

  it('casts what is on the disk', async () => {
    const [onDisk, inMemory] = [{ '': main, 'model.layers': 'disk', lm_head: 'disk' }, { '': main }]
    using model = await load(folder, { deviceMap: onDisk })
    using whole = await load(folder, { deviceMap: inMemory })
    expect(await logits(model.to('bfloat16'))).toEqual(await logits(whole.to('bfloat16')))
  })

  it('takes no state dict for what is on the disk', async () => {
    const deviceMap = { '': main, 'model.layers.1': 'disk' }
    using model = await load(folder, { deviceMap })
    const wanted = await logits(model)
    const weight = Tensor.full([300, 256], 0.5, 'float32', device)
    const up = Tensor.full([512, 256], 0.5, 'float32', device)
    const state = new Map([
      ['lm_head.weight', weight],
      ['model.layers.1.mlp.up_proj.weight', up],
    ])
    const error = await rejection(model.loadStateDict(state, { strict: false }))
    expect(error.code).toBe('ERR_HALFBYTE_USAGE')
    expect(error.message).toMatch(/model.layers.1.mlp.up_proj lies on the disk.*load the model again/)
    expect(await logits(model)).toEqual(wanted)
    for (const tensor of state.values()) tensor.dispose()
  })

  it('finds NaN in what it does not keep', async () => {
    const weights = tinyWeights(config)
    ;(weights.get('model.layers.1.mlp.up_proj.weight')!.data as Float32Array)[5] = NaN
    const path = writeTinyModel(join(root, `bad-${main.replace(':', '')}`), config, weights)
    const deviceMap = { '': main, 'model.layers.1': 'disk' }
    expect((await rejection(load(path, { deviceMap }))).message).toMatch(
      /NaN or infinity.*model.layers.1.mlp.up_proj.weight \(1\)/,
    )
    const quantizationConfig = { loadIn4bit: true, ...allowed }
    const options = { deviceMap, quantizationConfig, offloadFolder: join(root, 'bad-offload') }
    expect((await rejection(load(path, options))).message).toMatch(/model.layers.1.mlp.up_proj \(1\)/)
  })
})

describe('parts on the CPU beside an accelerator', () => {
  it('have a copy of what they share with the disk', async () => {
    const path = writeTinyModel(join(root, 'tied-apart'), { ...config, tie_word_embeddings: true })
    using whole = await load(path, { device: 'cpu' })
    for (const [embeddings, head] of [
      ['disk', 'cpu'],
      ['cpu', 'disk'],
    ]) {
      const deviceMap = { '': 'cpu:1', 'model.embed_tokens': embeddings!, lm_head: head! }
      using model = await load(path, { deviceMap })
      expect(model.lm_head.weight).not.toBe(model.model.embed_tokens.weight)
      expect(await logits(model)).toEqual(await logits(whole))
    }
  })

  const accelerators = ['cpu:1', ...devices().flatMap(({ type, name }) => (type === 'cuda' ? [name] : []))]

  it.each(accelerators)('stay quantised and compute there, with %s as the accelerator', async (name) => {
    const quantizationConfig = { loadIn4bit: true, bnb4bitQuantType: 'nf4' as const, ...allowed }
    const deviceMap = { '': name, 'model.layers.3': 'cpu', 'model.layers.4': 'cpu', lm_head: 'cpu' }
    using model = await load(folder, { deviceMap, quantizationConfig })
    using whole = await load(folder, { device: 'cpu', quantizationConfig })
    const layer = mlpOf(model, 3).up_proj
    expect(layer instanceof Linear4bit && layer.weight.device?.name).toBe('cpu')
    expect(relativeError(await logits(model), await logits(whole))).toBeLessThan(1e-4)
  })

  it('are chosen by a strategy for which the accelerator is too small', async () => {
    const quantizationConfig = { loadIn8bit: true, ...allowed }
    const maxMemory = { 'cpu:1': '2MB', cpu: '1GB' }
    using model = await load(folder, { deviceMap: 'auto', maxMemory, quantizationConfig })
    expect(new Set(Object.values(model.hfDeviceMap!))).toEqual(new Set(['cpu:1', 'cpu']))
    using whole = await load(folder, { device: 'cpu', quantizationConfig })
    expect(await logits(model)).toEqual(await logits(whole))
    const refused = await rejection(
      load(folder, { deviceMap: 'auto', maxMemory, quantizationConfig: { loadIn8bit: true } }),
    )
    expect(refused.code).toBe('ERR_HALFBYTE_CONFIG')
    expect(refused.message).toMatch(/llmInt8EnableFp32CpuOffload: true/)
  })
})
