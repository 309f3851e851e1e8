/** Device maps by strategy against those of transformers. No device is needed for most of it. */
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import {
  CausalLM,
  cleanDeviceMap,
  getBalancedMemory,
  getMaxMemory,
  inferAutoDeviceMap,
  Linear,
  mapByStrategy,
  Module,
  onMeta,
  Parameter,
  Sequential,
  type BitsAndBytesConfigOptions,
  type DeviceMap,
  type MapStrategy,
  type MaxMemory,
} from '../../lib'
import { placeOf } from '../../lib/checkpoint/placement'
import { unloaded } from '../support/causal_lm'
import { goldenSubset } from '../support/golden'
import { thrown } from '../support/errors'

const SHAPES: Record<string, Record<string, unknown>> = {
  'llama3-8b': {
    hidden_size: 4096,
    intermediate_size: 14336,
    num_hidden_layers: 32,
    num_attention_heads: 32,
    num_key_value_heads: 8,
    vocab_size: 128256,
  },
  'llama2-13b': {
    hidden_size: 5120,
    intermediate_size: 13824,
    num_hidden_layers: 40,
    num_attention_heads: 40,
    num_key_value_heads: 40,
    vocab_size: 32000,
  },
  'llama3-70b': {
    hidden_size: 8192,
    intermediate_size: 28672,
    num_hidden_layers: 80,
    num_attention_heads: 64,
    num_key_value_heads: 8,
    vocab_size: 128256,
  },
  'llama3.2-1b-tied': {
    hidden_size: 2048,
    intermediate_size: 8192,
    num_hidden_layers: 16,
    num_attention_heads: 32,
    num_key_value_heads: 8,
    vocab_size: 128256,
    tie_word_embeddings: true,
  },
}

const QUANT: Record<string, BitsAndBytesConfigOptions | undefined> = {
  none: undefined,
  nf4: { loadIn4bit: true, bnb4bitQuantType: 'nf4' },
  int8: { loadIn8bit: true },
}

interface GoldenMap {
  model: string
  quant: string
  strategy: MapStrategy
  max_memory_GiB: Record<string, number>
  total_bytes: number
  device_map?: Record<string, number | 'cpu' | 'disk'>
  error?: string
}

const golden = JSON.parse(readFileSync(join(goldenSubset, 'device_maps.json'), 'utf8')) as GoldenMap[]

function named(map: Record<string, number | string>): DeviceMap {
  return Object.fromEntries(Object.entries(map).map(([k, v]) => [k, typeof v === 'number' ? `cuda:${v}` : v]))
}

function limits(row: GoldenMap): MaxMemory {
  return Object.fromEntries(Object.entries(row.max_memory_GiB).map(([k, n]) => [k, `${n}GiB`]))
}

/** What transformers does: the strategy's share, a tenth kept for quantised models, the greedy filling. */
function asTransformers(model: CausalLM, row: GoldenMap): DeviceMap {
  const maxMemory = limits(row)
  const memory =
    row.strategy === 'sequential'
      ? getMaxMemory(maxMemory)
      : getBalancedMemory(model, { maxMemory, lowZero: row.strategy === 'balanced_low_0' })
  const share = row.quant === 'none' ? 1 : 0.9
  const reduced = Object.fromEntries(Object.entries(memory).map(([k, n]) => [k, Math.floor(n * share)]))
  return inferAutoDeviceMap(model, { maxMemory: reduced })
}

const built = new Map<string, CausalLM>()

function goldenModel({ model, quant }: GoldenMap): CausalLM {
  const key = `${model} ${quant}`
  if (!built.has(key)) built.set(key, unloaded(SHAPES[model]!, QUANT[quant]))
  return built.get(key)!
}

describe('the maps of transformers', () => {
  it('are all here', () => {
    expect(golden).toHaveLength(96)
    expect(golden.filter(({ error }) => error === undefined).length).toBeGreaterThan(75)
  })

  describe.each(Object.keys(SHAPES))('%s', (name) => {
    it.each(Object.keys(QUANT))('%s', (quant) => {
      const rows = golden.filter((row) => row.model === name && row.quant === quant)
      expect(rows).toHaveLength(8)
      for (const row of rows) {
        const ours = asTransformers(goldenModel(row), row)
        if (row.device_map) expect(ours).toEqual(named(row.device_map))
        // it refuses maps with quantised layers on the host; so must ours be one
        else expect(Object.values(ours).some((place) => place === 'cpu' || place === 'disk')).toBe(true)
      }
    })
  })
})

describe('where ours go further', () => {
  it('no accelerator is left empty, and all else stays as transformers has it', () => {
    let filled = 0
    for (const row of golden) {
      if (row.strategy !== 'auto' || !row.device_map || row.model === 'llama3-70b') continue
      const model = goldenModel(row)
      const ours = mapByStrategy(model, row.strategy, {
        maxMemory: limits(row),
        quantized: row.quant !== 'none',
      })
      const theirs = named(row.device_map)
      const places = Object.keys(getMaxMemory(limits(row))).filter((place) => place.startsWith('cuda'))
      const spills = Object.values(theirs).some((place) => !place.startsWith('cuda'))
      if (spills || places.every((place) => Object.values(theirs).includes(place))) {
        expect(ours).toEqual(theirs)
        continue
      }
      filled++
      expect(new Set(Object.values(ours))).toEqual(new Set(places))
      // every tensor has a place, and parts follow one another in the order of the layers
      const layers = Array.from({ length: model.spec.layers.length }, (_, i) =>
        placeOf(ours, `model.layers.${i}`)!,
      )
      expect(layers.every((place) => place !== undefined)).toBe(true)
      expect([...layers].sort()).toEqual(layers)
    }
    expect(filled).toBeGreaterThan(5)
  })

  it('keeps the fullest part as small as whole layers allow', () => {
    const model = unloaded({ ...SHAPES['llama3-8b'], tie_word_embeddings: false }, QUANT['nf4'])
    const map = mapByStrategy(model, 'auto', {
      maxMemory: { 0: '24GiB', 1: '24GiB', 2: '24GiB', 3: '24GiB' },
      quantized: true,
    })
    const count = (place: string) =>
      Array.from({ length: 32 }, (_, i) => map[`model.layers.${i}`]).filter((p) => p === place).length
    // embeddings and head weigh as much as ten layers
    expect([0, 1, 2, 3].map((i) => count(`cuda:${i}`))).toEqual([3, 13, 13, 3])
  })
})

/** Sizes of accelerate's own examples: 64, 72 and 100 bytes. */
class Norm extends Module {
  weight = new Parameter([4], { dtype: 'float32' })
  bias = new Parameter([4], { dtype: 'float32' })
  running = new Parameter([10], { dtype: 'float32' })
  forward(): never {
    throw new Error('not called')
  }
}

class Example extends Module {
  linear1 = new Linear(3, 4)
  batchnorm = new Norm()
  linear2 = new Linear(4, 5)
  forward(): never {
    throw new Error('not called')
  }
}

describe('filling', () => {
  const make = (tie = false) => {
    const model = onMeta(() => new Example())
    if (tie) {
      model.linear2 = onMeta(() => new Linear(3, 4))
      model.linear2.weight = model.linear1.weight
    }
    return model
  }
  const stack = () => onMeta(() => new Sequential(new Example(), new Example(), new Example()))

  it('keeps room for the largest layer on the first device only', () => {
    const maxMemory = { 0: 200, 1: 200 }
    expect(inferAutoDeviceMap(make(), { maxMemory })).toEqual({
      linear1: 'cuda:0',
      batchnorm: 'cuda:1',
      linear2: 'cuda:1',
    })
  })

  it('splits modules, but not those of a class that is to stay in one piece', () => {
    expect(inferAutoDeviceMap(stack(), { maxMemory: { 0: 500, 1: 500 } })).toEqual({
      0: 'cuda:0',
      '1.linear1': 'cuda:0',
      '1.batchnorm': 'cuda:0',
      '1.linear2': 'cuda:1',
      2: 'cuda:1',
    })
    const options = { maxMemory: { 0: 500, 1: 500 }, noSplitModuleClasses: ['Example'] }
    expect(inferAutoDeviceMap(stack(), options)).toEqual({ 0: 'cuda:0', 1: 'cuda:1', 2: 'cuda:1' })
  })

  it('puts tied weights on one place', () => {
    const map = inferAutoDeviceMap(make(true), { maxMemory: { 0: 400, cpu: 1000 } })
    expect(map).toEqual({ '': 'cuda:0' })
    const model = stack()
    const layers = [...model] as Example[]
    layers[2]!.linear2.weight = layers[0]!.linear2.weight
    const split = inferAutoDeviceMap(model, { maxMemory: { 0: 400, 1: 500 } })
    expect(split).toEqual({
      0: 'cuda:0',
      '2.linear2': 'cuda:0',
      1: 'cuda:1',
      '2.linear1': 'cuda:1',
      '2.batchnorm': 'cuda:1',
    })
  })

  it('leaves on the disk what finds no room, unless the disk has a limit', () => {
    expect(inferAutoDeviceMap(make(), { maxMemory: { cpu: 200 } })).toEqual({
      linear1: 'cpu',
      batchnorm: 'disk',
      linear2: 'disk',
    })
    const error = thrown(() => inferAutoDeviceMap(make(), { maxMemory: { 0: 200, disk: 0 } }))
    expect(error.code).toBe('ERR_HALFBYTE_OUT_OF_MEMORY')
    expect(error.message).toMatch(/no place is left for batchnorm \(72 bytes\) of a model of 236 bytes/)
  })

  it('balances: an average and room for the largest piece, the last device unlimited', () => {
    const balance = (maxMemory: MaxMemory, lowZero = false) =>
      getBalancedMemory(make(), { maxMemory, lowZero })
    // 236 / 2, and 100 * 1.25
    expect(balance({ 0: 300, 1: 300 })).toEqual({ 'cuda:0': 243, 'cuda:1': 300 })
    expect(balance({ 0: 300, 1: 500 })).toEqual({ 'cuda:0': 243, 'cuda:1': 500 })
    expect(balance({ 0: 0, 1: 300, 2: 300 })).toEqual({ 'cuda:0': 0, 'cuda:1': 243, 'cuda:2': 300 })
    expect(balance({ 0: 200, 2: 200 })).toEqual({ 'cuda:0': 200, 'cuda:2': 200 })
    expect(balance({ 0: 300, cpu: 1000 })).toEqual({ 'cuda:0': 300, cpu: 1000 })
    expect(balance({ 0: 300, 1: 300 }, true)).toEqual({ 'cuda:0': 0, 'cuda:1': 300 })
  })

  it('joins what lies together', () => {
    expect(cleanDeviceMap({ a: 'x', b: 'x', c: 'x' })).toEqual({ '': 'x' })
    expect(cleanDeviceMap({ 'a.x': 'x', 'a.y': 'x', 'b.x': 'y', 'b.y': 'y', c: 'y' })).toEqual({
      a: 'x',
      b: 'y',
      c: 'y',
    })
    expect(cleanDeviceMap({ 'a.1': 'x', 'a.10': 'y' })).toEqual({ 'a.1': 'x', 'a.10': 'y' })
  })
})
