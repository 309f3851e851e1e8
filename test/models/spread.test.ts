/** Models spread over devices by a device map: the same results as on one device. */
import { join } from 'node:path'
import {
  Decoder,
  dequantize,
  device,
  devices,
  dispatchModel,
  getMemoryFootprint,
  Linear,
  loadCheckpoint,
  Module,
  replaceWithQuantizedLinear,
  Sequential,
  Tensor,
  type DeviceMapOption,
  type FromPretrainedOptions,
} from '../../lib'
import { ids, load, logits } from '../support/causal_lm'
import { rejection, thrown } from '../support/errors'
import { temporaryFolder } from '../support/files'
import { goldenSubset } from '../support/golden'
import { allocatedMemory, baselineMemory } from '../support/memory'
import { relativeError } from '../support/reference'
import { tinyWeights, writeTinyModel } from '../support/tiny_model'

const root = temporaryFolder()
const config = { num_hidden_layers: 4 }
const folder = writeTinyModel(join(root, 'plain'), config)
const tied = writeTinyModel(join(root, 'tied'), { ...config, tie_word_embeddings: true })
const nf4 = join(goldenSubset, 'models', 'llama-bnb-nf4')

async function expected(path: string, options: FromPretrainedOptions) {
  using model = await load(path, options)
  return {
    logits: await logits(model),
    tokens: (await model.generate(ids, { maxNewTokens: 12, minNewTokens: 12 })).tokenIds,
    loss: await model.loss(ids),
    footprint: getMemoryFootprint(model),
  }
}

const gpus = devices()
  .filter(({ type }) => type === 'cuda')
  .map(({ name }) => name)
const pairs: [string, string][] = [['cpu', 'cpu:1']]
if (gpus[0]) pairs.push(['cpu', gpus[0]])
if (gpus[1]) pairs.push([gpus[0]!, gpus[1]])

describe.each(pairs)('a model on %s and %s', (a, b) => {
  // sums are taken in another order on a GPU than on the CPU
  const mixed = device(a).type !== device(b).type
  const close = (actual: Float32Array, wanted: Float32Array) => {
    if (mixed) expect(relativeError(actual, wanted)).toBeLessThan(1e-5)
    else expect(actual).toEqual(wanted)
  }

  const maps: [string, Record<string, string>][] = [
    [
      'by halves',
      {
        'model.embed_tokens': a,
        'model.layers.0': a,
        'model.layers.1': a,
        'model.layers': b,
        'model.norm': b,
        'model.rotary_emb': b,
        lm_head: b,
      },
    ],
    ['layer by layer', { '': a, 'model.layers.0': b, 'model.layers.2': b }],
    ['with the embeddings elsewhere', { '': b, 'model.embed_tokens': a }],
    ['with the head elsewhere', { '': b, lm_head: a }],
    [
      'with layers that are split',
      {
        '': b,
        'model.layers.0.mlp': a,
        'model.layers.1.self_attn': a,
        'model.layers.2.self_attn.q_proj': a,
        'model.layers.3.post_attention_layernorm': a,
      },
    ],
    [
      'with one tensor of a layer at a time',
      {
        '': a,
        'model.layers.1.mlp.down_proj': b,
        'model.layers.1.mlp.gate_proj': b,
        'model.layers.1.self_attn.o_proj': b,
      },
    ],
  ]

  describe.each(maps)('%s', (_, deviceMap) => {
    it('gives the logits, tokens and loss of one device', async () => {
      const wanted = await expected(folder, { device: a })
      using model = await load(folder, { deviceMap })
      expect(model.hfDeviceMap).toEqual(deviceMap)
      close(await logits(model), wanted.logits)
      const { tokenIds } = await model.generate(ids, { maxNewTokens: 12, minNewTokens: 12 })
      expect(tokenIds).toEqual(wanted.tokens)
      expect(await model.loss(ids)).toBeCloseTo(wanted.loss, 5)
    })

    it('does so quantised, in batches, and sampling', async () => {
      const quantizationConfig = { loadIn8bit: true, llmInt8EnableFp32CpuOffload: true }
      const wanted = await expected(folder, { device: a, quantizationConfig })
      using model = await load(folder, { deviceMap, quantizationConfig })
      if (!mixed) close(await logits(model), wanted.logits)
      using whole = await load(folder, { device: a, quantizationConfig })
      const options = { maxNewTokens: 6, temperature: 0.7, topK: 5, seed: 7, repetitionPenalty: 1.1 }
      const ours = await model.generate([ids, [7, 8, 9]], options)
      if (!mixed) {
        const theirs = await whole.generate([ids, [7, 8, 9]], options)
        expect(ours.map((r) => r.tokenIds)).toEqual(theirs.map((r) => r.tokenIds))
      }
      expect(ours.every(({ tokenIds }) => tokenIds.length > 0)).toBe(true)
    })
  })

  it('has every module where the map says, and no tensor elsewhere', async () => {
    const deviceMap = { '': a, 'model.layers.1': b, 'model.layers.2.mlp': b }
    using model = await load(folder, {
      deviceMap,
      quantizationConfig: {
        loadIn4bit: true,
        bnb4bitUseDoubleQuant: true,
        llmInt8EnableFp32CpuOffload: true,
      },
    })
    for (const [path, module] of model.namedModules()) {
      const wanted = /^model\.layers\.(1|2\.mlp)(\.|$)/.test(path) ? b : a
      for (const [, parameter] of module.ownParameters())
        expect([path, parameter.device!.name]).toEqual([path, wanted])
      for (const [, tensor] of module.ownStatistics())
        expect([path, tensor.device.name]).toEqual([path, wanted])
    }
    expect(model.device!.name).toBe(a)
    const error = thrown(() => model.to(a))
    expect(error.code).toBe('ERR_HALFBYTE_USAGE')
    expect(error.message).toMatch(/a device map has spread this model/)
  })

  it('copies a tied weight that two devices need, and counts and saves it once', async () => {
    const wanted = await expected(tied, { device: a })
    using model = await load(tied, { deviceMap: { '': a, lm_head: b } })
    close(await logits(model), wanted.logits)
    expect(model.model.embed_tokens.weight.device!.name).toBe(a)
    expect(model.lm_head.weight.device!.name).toBe(b)
    using one = await load(tied, { device: a })
    expect(model.numParameters()).toBe(one.numParameters())
    expect(getMemoryFootprint(model)).toBe(getMemoryFootprint(one) + 50 * 64 * 4)
    const state = await model.stateDict()
    expect([...state.keys()].filter((name) => /embed|head/.test(name))).toEqual(['model.embed_tokens.weight'])
    for (const tensor of state.values()) tensor.dispose()
    const out = join(root, `saved-${[a, b].join('-').replaceAll(':', '')}`)
    await model.savePretrained(out)
    using back = await load(out, { device: a })
    close(await logits(back), wanted.logits)
  })

  it('keeps the copy of a tied weight as the weight is', async () => {
    using model = await load(tied, { deviceMap: { '': a, lm_head: b } })
    using one = await load(tied, { device: a })
    const state = await one.stateDict()
    expect(state.has('lm_head.weight')).toBe(true)
    const table = state.get('model.embed_tokens.weight')!
    using other = Tensor.full([...table.shape], 0.25, 'float32', a)
    const entries = [...state].map(([name, t]): [string, Tensor] => [
      name,
      t.storageId === table.storageId ? other : t,
    ])
    await model.loadStateDict(new Map(entries))
    await one.loadStateDict(new Map(entries))
    close(await logits(model), await logits(one))
    // either name will do
    for (const left of ['lm_head.weight', 'model.embed_tokens.weight']) {
      using another = Tensor.full([...table.shape], left.length / 100, 'float32', a)
      const rest = entries.filter(([name]) => name !== left)
      const changed = new Map(
        rest.map(([name, t]) => [name, /lm_head|embed_tokens/.test(name) ? another : t]),
      )
      await model.loadStateDict(changed)
      await one.loadStateDict(changed)
      close(await logits(model), await logits(one))
    }
    using narrow = Tensor.full([2, 2], 1, 'float32', a)
    const wrong = await rejection(model.loadStateDict(new Map([...state, ['lm_head.weight', narrow]])))
    expect(wrong.message).toMatch(/lm_head.weight has shape \[2, 2\]/)
    expect(model.to('bfloat16').lm_head.weight.dtype).toBe('bfloat16')
    expect(model.lm_head.weight.device!.name).toBe(b)
    for (const tensor of state.values()) tensor.dispose()
  })

  it('refuses to have its modules replaced', async () => {
    const quantizationConfig = { loadIn4bit: true, llmInt8EnableFp32CpuOffload: true }
    using model = await load(folder, { deviceMap: { '': a, 'model.layers.1': b } })
    const wanted = await logits(model)
    const errors = [
      thrown(() => replaceWithQuantizedLinear(model, quantizationConfig)),
      thrown(() => dequantize(model)),
      thrown(() => model.setSubmodule('lm_head', new Linear(2, 2))),
      await rejection(loadCheckpoint(model, folder)),
    ]
    for (const error of errors) {
      expect(error.code).toBe('ERR_HALFBYTE_USAGE')
      expect(error.message).toMatch(/: a device map has spread this model; \w+ it/)
    }
    expect(await logits(model)).toEqual(wanted)
  })

  it('takes a tied checkpoint that has the weight under the head’s name', async () => {
    const weights = tinyWeights({ ...config, tie_word_embeddings: true })
    const renamed = new Map(
      [...weights].map(([n, t]) => [n === 'model.embed_tokens.weight' ? 'lm_head.weight' : n, t]),
    )
    const path = writeTinyModel(
      join(root, `renamed-${[a, b].join('-').replaceAll(':', '')}`),
      { ...config, tie_word_embeddings: true },
      renamed,
    )
    using model = await load(path, { deviceMap: { '': a, lm_head: b } })
    close(await logits(model), (await expected(tied, { device: a })).logits)
  })

  it('keeps tied weights together where a strategy places them', async () => {
    const maxMemory = { [b === 'cpu:1' ? 'cpu:2' : b]: '1GB', [a === 'cpu' ? 'cpu:1' : a]: '1GB' }
    using model = await load(tied, { deviceMap: 'auto', maxMemory })
    expect(model.lm_head.weight).toBe(model.model.embed_tokens.weight)
    expect(new Set(Object.values(model.hfDeviceMap!)).size).toBe(2)
    close(await logits(model), (await expected(tied, { device: a })).logits)
  })

  it('loads a checkpoint that is quantised already', async () => {
    const wanted = await expected(nf4, { device: a })
    const deviceMap = { '': b, 'model.layers.0': a, 'model.embed_tokens': a }
    const quantizationConfig = { loadIn4bit: true, llmInt8EnableFp32CpuOffload: true }
    using model = await load(nf4, { deviceMap, quantizationConfig })
    if (!mixed) close(await logits(model), wanted.logits)
    expect((await logits(model)).every(Number.isFinite)).toBe(true)
    if (device(a).type === 'cuda') return
    const refused = await rejection(load(nf4, { deviceMap }))
    expect(refused.code).toBe('ERR_HALFBYTE_CONFIG')
    expect(refused.message).toMatch(
      /7 quantised modules would not be on an accelerator: model.layers.0.self_attn.q_proj \(cpu\)/,
    )
  })

  it('frees both devices when it is disposed, and when loading fails', async () => {
    const deviceMap = { '': a, 'model.layers.1': b, lm_head: b }
    const both = [a, b].map((name) => device(name))
    const before = await Promise.all(both.map(baselineMemory))
    const model = await load(tied, { deviceMap })
    await model.generate(ids, { maxNewTokens: 3 })
    model.dispose()
    const bad = tinyWeights(config)
    ;(bad.get('model.layers.1.mlp.up_proj.weight')!.data as Float32Array)[5] = NaN
    const path = writeTinyModel(join(root, `bad-${[a, b].join('-').replaceAll(':', '')}`), config, bad)
    expect((await rejection(load(path, { deviceMap }))).message).toMatch(
      /model.layers.1.mlp.up_proj.weight \(1\)/,
    )
    const after = await Promise.all(both.map(allocatedMemory))
    after.forEach((bytes, i) => expect(bytes).toBeLessThanOrEqual(before[i]!))
  })
})

describe('a model of one’s own', () => {
  class Residual extends Module {
    up = new Linear(8, 16)
    down = new Linear(16, 8)
    forward(x: Tensor, options: { residual: Tensor }): Tensor {
      return this.down.forward(this.up.forward(x), options.residual)
    }
  }
  class Net extends Module {
    first = new Sequential(new Linear(8, 8), new Linear(8, 8))
    blocks = [new Residual(), new Residual()]
    forward(x: Tensor): Tensor {
      let h = this.first.forward(x)
      for (const block of this.blocks) h = block.forward(h, { residual: h })
      return h
    }
  }

  it('is spread by paths, with what its layers get moved, also in options', async () => {
    const net = new Net().to('cpu')
    using x = Tensor.from(
      Float32Array.from({ length: 24 }, (_, i) => Math.sin(i)),
      { shape: [3, 8], device: 'cpu' },
    )
    const wanted = await net.forward(x).data()
    const map: DeviceMapOption = {
      'first.0': 'cpu',
      'first.1': 'cpu:1',
      'blocks.0': 'cpu:1',
      'blocks.1.up': 'cpu',
      'blocks.1.down': 'cpu:2',
    }
    expect(dispatchModel(net, map)).toEqual(map)
    expect((net as { hfDeviceMap?: DeviceMapOption }).hfDeviceMap).toEqual(map)
    const y = net.forward(x)
    expect(await y.data()).toEqual(wanted)
    expect(y.device.name).toBe('cpu')
    using elsewhere = x.to('cpu:3')
    expect(await net.forward(elsewhere).data()).toEqual(wanted)
    expect(thrown(() => dispatchModel(net, 'cpu')).code).toBe('ERR_HALFBYTE_USAGE')
  })

  it('may return its own weights, and take lists with gaps', async () => {
    class Table extends Module {
      weight = new Linear(4, 4, { bias: false, device: 'cpu' }).weight
      forward([, x]: [undefined, Tensor]): Tensor {
        return x.device === this.weight.device ? this.weight.value : x
      }
    }
    class Holder extends Module {
      first = new Linear(4, 4, { device: 'cpu' })
      table = new Table()
      forward(x: Tensor): Tensor {
        return this.table.forward([undefined, this.first.forward(x)])
      }
    }
    const net = new Holder()
    const wanted = await net.table.weight.value.data()
    dispatchModel(net, { first: 'cpu', table: 'cpu:1' })
    using x = Tensor.full([1, 4], 0.5, 'float32', 'cpu')
    for (let i = 0; i < 2; i++) {
      const y = net.forward(x)
      expect(await y.data()).toEqual(wanted)
      expect(y.device.name).toBe('cpu')
    }
  })

  it('by a strategy too', async () => {
    const net = new Net().to('cpu')
    using x = Tensor.full([2, 8], 0.5, 'float32', 'cpu')
    const wanted = await net.forward(x).data()
    const map = dispatchModel(net, 'sequential', { maxMemory: { 'cpu:1': 2000, 'cpu:2': 5000 } })
    expect(new Set(Object.values(map))).toEqual(new Set(['cpu:1', 'cpu:2']))
    expect(await net.forward(x).data()).toEqual(wanted)
    expect(thrown(() => dispatchModel(new Net(), { '': 'disk' })).message).toMatch(
      /cannot have modules on the disk/,
    )
  })
})

describe('fromPretrained', () => {
  it('says where a model without a map is', async () => {
    using model = await load(folder, { device: 'cpu:1' })
    expect(model.hfDeviceMap).toEqual({ '': 'cpu:1' })
    using mapped = await load(folder, { deviceMap: 'cpu' })
    expect(mapped.hfDeviceMap).toEqual({ '': 'cpu' })
    mapped.to('cpu:1')
    expect(await logits(mapped)).toEqual(await logits(model))
  })

  it('frees a model that cannot be prepared', async () => {
    const before = await baselineMemory(device('cpu'))
    const prepare = jest.spyOn(Decoder.prototype, 'prepare').mockImplementation(() => {
      throw new Error('no room')
    })
    try {
      await expect(load(folder, { device: 'cpu' })).rejects.toThrow('no room')
    } finally {
      prepare.mockRestore()
    }
    expect(await allocatedMemory(device('cpu'))).toBeLessThanOrEqual(before)
  })

  it('refuses a device beside a map', async () => {
    const error = await rejection(load(folder, { device: 'cpu', deviceMap: 'auto' }))
    expect(error.code).toBe('ERR_HALFBYTE_VALUE')
    expect(error.message).toMatch(/device and deviceMap were both given/)
  })
})
