import {
  BitsAndBytesConfig,
  Conv1D,
  dequantize,
  devices,
  Embedding,
  getTrueFootprint,
  HalfbyteError,
  LayerNorm,
  Linear,
  Linear4bit,
  Linear8bit,
  Module,
  ModuleList,
  Parameter,
  replaceWithQuantizedLinear,
  RMSNorm,
  Sequential,
  Tensor,
  type Shape,
} from '../../lib/index.js'
import { thrown } from '../support/errors.js'
import { relativeError } from '../support/reference.js'
import { replacedPaths, Tree } from '../support/tree'

const nf4 = new BitsAndBytesConfig({ loadIn4bit: true, bnb4bitQuantType: 'nf4' })
const int8 = new BitsAndBytesConfig({ loadIn8bit: true })
const meta = { device: 'meta', bias: false } as const

const linear = (k = 4, n = 4) => new Linear(k, n, meta)
/** The module at a path, which must be of a class. */
function at<M extends Module>(model: Module, path: string, kind: abstract new (...args: never[]) => M): M {
  const module = model.getSubmodule(path)
  if (module instanceof kind) return module
  throw new Error(`${path} is a ${module.constructor.name}`)
}
const kinds = (model: Module) =>
  Object.fromEntries([...model.namedModules()].map(([path, module]) => [path, module.constructor.name]))

describe.each([
  ['4-bit', nf4, 'Linear4bit'],
  ['8-bit', int8, 'Linear8bit'],
])('replaceWithQuantizedLinear, %s', (_, config, kind) => {
  const one = () => new Tree({ lm_head: linear(), fc: linear() })
  const two = () => new Tree({ a: linear(), b: linear(), norm: new LayerNorm(4, { device: 'meta' }) })
  const nested = () => new Tree({ first: two(), lm_head: linear(), rest: new ModuleList([two(), linear()]) })
  const doubleNested = () => new Tree({ x: nested(), y: nested(), z: two() })

  it('replaces linear layers at every depth but the heads', () => {
    expect(replacedPaths(replaceWithQuantizedLinear(one(), config))).toEqual(['fc'])
    expect(replacedPaths(replaceWithQuantizedLinear(two(), config))).toEqual(['a', 'b'])
    const model = nested()
    const report = replaceWithQuantizedLinear(model, config)
    expect(replacedPaths(report)).toEqual(['first.a', 'first.b', 'rest.0.a', 'rest.0.b', 'rest.1'])
    expect(report.kept).toEqual([{ path: 'lm_head', reason: 'output head (by its name)' }])
    expect(kinds(model)).toMatchObject({
      lm_head: 'Linear',
      'rest.1': kind,
      'first.a': kind,
      'first.norm': 'LayerNorm',
    })
    const deep = doubleNested()
    expect(replaceWithQuantizedLinear(deep, config).replaced.length).toBe(12)
    expect(kinds(deep)).toMatchObject({ 'x.lm_head': 'Linear', 'y.lm_head': 'Linear', 'y.rest.1': kind })
  })

  it('throws when there was nothing to replace, and says why', () => {
    const error = thrown(() => replaceWithQuantizedLinear(new Tree({ norm: new LayerNorm(4) }), config))
    expect(error).toBeInstanceOf(HalfbyteError)
    expect(error.code).toBe('ERR_HALFBYTE_NO_LINEAR')
    expect(error.message).toContain('no linear layers')
    const head = thrown(() => replaceWithQuantizedLinear(new Tree({ lm_head: linear() }), config))
    expect(head.message).toMatch(/lm_head: output head/)
    const model = two()
    replaceWithQuantizedLinear(model, config)
    const again = thrown(() => replaceWithQuantizedLinear(model, config))
    expect(again.code).toBe('ERR_HALFBYTE_NO_LINEAR')
    expect(again.message).toContain('a: quantised already')
  })

  it('keeps what the model calls its output embeddings', () => {
    class Model extends Tree {
      readonly out = linear(4, 9)
      getOutputEmbeddings(): Module {
        return this.out
      }
    }
    const model = new Model({ a: linear(), b: linear() })
    const report = replaceWithQuantizedLinear(model, config)
    expect(replacedPaths(report).sort()).toEqual(['a', 'b'])
    expect(report.kept).toEqual([{ path: 'out', reason: 'output head' }])
  })

  it('keeps layers whose weight is tied, and says to what', () => {
    const embed = new Embedding(9, 4, { device: 'meta' })
    const out = linear(4, 9)
    out.weight = embed.weight
    const model = new Tree({ embed, fc: linear(), out })
    const report = replaceWithQuantizedLinear(model, config)
    expect(replacedPaths(report)).toEqual(['fc'])
    expect(report.kept).toEqual([{ path: 'out', reason: 'its weight is tied to embed' }])
    expect(out.weight).toBe(embed.weight)

    const [a, b] = [linear(), linear()]
    b.weight = a.weight
    expect(replacedPaths(replaceWithQuantizedLinear(new Tree({ a, b, c: linear() }), config))).toEqual(['c'])
  })

  it('keeps a last layer that scores the rows of an embedding table', () => {
    const model = new Tree({
      table: new Embedding(9, 4, { device: 'meta' }),
      fc: linear(),
      out: linear(4, 9),
    })
    const report = replaceWithQuantizedLinear(model, config)
    expect(replacedPaths(report)).toEqual(['fc'])
    expect(report.kept[0]!.reason).toBe('output head (one score for each row of table)')
  })

  it('keeps task heads, with what is below them', () => {
    const model = new Tree({ fc: linear(), score: linear(), classifier: new Tree({ out_proj: linear() }) })
    expect(replacedPaths(replaceWithQuantizedLinear(model, config))).toEqual(['fc'])
  })

  it('keeps routers, and no gate that is none', () => {
    const model = new Tree({
      moe: new Tree({ gate: linear(4, 2), experts: new ModuleList([linear(), linear()]) }),
      mlp: new Tree({ gate: linear(), gate_proj: linear() }),
      other: new Tree({ router: linear(4, 2) }),
    })
    const report = replaceWithQuantizedLinear(model, config)
    expect(replacedPaths(report)).toEqual(['moe.experts.0', 'moe.experts.1', 'mlp.gate', 'mlp.gate_proj'])
    expect(report.kept.map(({ reason }) => reason)).toEqual(['router', 'router'])
  })

  it("adds the user's lists to what is kept, and reports entries that mean nothing", () => {
    const listed = new BitsAndBytesConfig({ ...plain(config), llmInt8SkipModules: ['layers.1', 'vproj'] })
    const block = () => new Tree({ v_proj: linear(), kv_proj: linear() })
    const layers = Array.from({ length: 11 }, block)
    const model = new Tree({ layers: new ModuleList(layers), lm_head: linear() })
    const report = replaceWithQuantizedLinear(model, listed, {
      modulesToNotConvert: ['v_proj', 'layers.3.*'],
    })
    const kept = new Map(report.kept.map(({ path, reason }) => [path, reason]))
    expect(kept.get('lm_head')).toMatch(/output head/)
    expect(kept.get('layers.1.kv_proj')).toBe("named by 'layers.1'")
    expect(kept.get('layers.10.v_proj')).toBe("named by 'v_proj'")
    expect(kept.get('layers.3.kv_proj')).toBe("named by 'layers.3.*'")
    expect(replacedPaths(report)).toContain('layers.10.kv_proj')
    expect(report.replaced.length).toBe(9)
    expect(report.unmatched).toEqual(['vproj'])
  })

  it('keeps classes derived from Linear, and one module in two places stays one', () => {
    class Scaled extends Linear {}
    const shared = linear()
    const model = new Tree({ a: shared, b: shared, c: new Scaled(4, 4, meta) })
    const report = replaceWithQuantizedLinear(model, config)
    expect(replacedPaths(report)).toEqual(['a'])
    expect(report.kept).toEqual([{ path: 'c', reason: 'Scaled is a class of its own' }])
    expect(model.getSubmodule('b')).toBe(model.getSubmodule('a'))
    expect(model.getSubmodule('a').constructor.name).toBe(kind)
  })

  it('takes the bias over as it is, ties included', () => {
    const [a, b] = [new Linear(4, 4, { device: 'cpu' }), new Linear(4, 4, { device: 'meta' })]
    b.bias = a.bias
    const model = new Tree({ a: new Linear(4, 4, { device: 'meta' }), b })
    replaceWithQuantizedLinear(model, config)
    expect(at(model, 'b', Linear).bias).toBe(a.bias)
  })
})

function plain(config: BitsAndBytesConfig): object {
  return config.loadIn8bit ? { loadIn8bit: true } : { loadIn4bit: true }
}

describe('settings of the replaced layers', () => {
  it('are those of the config', () => {
    const model = new Tree({ a: linear() })
    replaceWithQuantizedLinear(model, {
      loadIn4bit: true,
      bnb4bitQuantType: 'nf4',
      bnb4bitComputeDtype: 'bfloat16',
    })
    const layer = at(model, 'a', Linear4bit)
    expect([layer.quantType, layer.computeDtype]).toEqual(['nf4', 'bfloat16'])
    const other = new Tree({ a: linear() })
    replaceWithQuantizedLinear(other, { loadIn8bit: true, llmInt8Threshold: 3, bnbExact: true })
    const int = at(other, 'a', Linear8bit)
    expect([int.threshold, int.bnbExact, int.hasFp16Weights]).toEqual([3, true, false])
  })

  it('bnbExact is about the modules between int8 layers too, until they are dequantised', () => {
    const model = new Tree({ a: linear(), norm: new RMSNorm(4) })
    const norm = at(model, 'norm', RMSNorm)
    replaceWithQuantizedLinear(model, { loadIn8bit: true, bnbExact: true })
    expect(norm.bnbExact).toBe(true)
    dequantize(model)
    expect(norm.bnbExact).toBe(false)
    replaceWithQuantizedLinear(model, { loadIn8bit: true })
    dequantize(model)
    replaceWithQuantizedLinear(model, { loadIn4bit: true, bnbExact: true })
    expect(norm.bnbExact).toBe(false)
  })

  it('both modes at once are refused', () => {
    const model = new Tree({ a: linear() })
    const error = thrown(() => replaceWithQuantizedLinear(model, { loadIn4bit: true, loadIn8bit: true }))
    expect(error.code).toBe('ERR_HALFBYTE_CONFIG')
    expect(kinds(model)['a']).toBe('Linear')
  })

  it('a patched model moves, but is not cast', () => {
    const model = new Tree({ a: linear(), norm: new LayerNorm(4) })
    replaceWithQuantizedLinear(model, nf4)
    const error = thrown(() => model.to('float16'))
    expect(error.code).toBe('ERR_HALFBYTE_DTYPE')
    expect(error.message).toMatch(/a is a Linear4bit.*dequantize/)
    expect(at(model, 'norm', LayerNorm).weight!.dtype).toBe('float32')
    expect(model.to('cpu')).toBe(model)
  })
})

describe('replaceWithQuantizedLinear, only', () => {
  class Own extends Linear {}
  const model = () =>
    new Tree({ up: linear(), layers: new ModuleList([new Own(4, 4, meta), linear()]), lm_head: linear() })

  it('replaces what is listed, heads and classes of their own too, by whole paths', () => {
    const some = model()
    const config = new BitsAndBytesConfig({ loadIn4bit: true, llmInt8SkipModules: ['lm_head'] })
    const report = replaceWithQuantizedLinear(some, config, { only: ['lm_head', 'layers.0', '1', 'gone'] })
    expect(replacedPaths(report)).toEqual(['layers.0', 'lm_head'])
    expect(report.kept).toEqual([
      { path: 'up', reason: 'not asked for' },
      { path: 'layers.1', reason: 'not asked for' },
    ])
    expect(report.unmatched).toEqual(['1', 'gone'])
    expect(report.skipModules).toEqual(['up', 'layers.1'])
    at(some, 'lm_head', Linear4bit)
    const error = thrown(() => replaceWithQuantizedLinear(model(), int8, { only: [] }))
    expect(error.code).toBe('ERR_HALFBYTE_NO_LINEAR')
  })

  it('leaves the memory of a tied weight to the other module', async () => {
    const table = new Embedding(8, 64, { device: 'cpu' })
    const head = new Linear(64, 8, { device: 'cpu', bias: false })
    head.weight.dispose()
    head.weight = table.weight
    const tied = new Tree({ table, head })
    expect(replacedPaths(replaceWithQuantizedLinear(tied, nf4, { only: ['head'] }))).toEqual(['head'])
    expect(at(tied, 'head', Linear4bit).weight.isLoaded).toBe(true)
    expect((await table.weight.value.floats()).length).toBe(512)
    tied.dispose()
  })
})

describe.each(devices())('patching weights in memory on %s', (device) => {
  class Net extends Module {
    fc1 = new Linear(96, 64, { device })
    fc2 = new Conv1D(64, 32, { device })
    lm_head = new Linear(32, 7, { device })
    forward(x: Tensor): Tensor {
      return new Sequential(this.fc1, this.fc2, this.lm_head).forward(x)
    }
  }
  const ramp = (shape: Shape) => {
    const values = Float32Array.from({ length: shape.reduce((a, b) => a * b, 1) }, (_, i) =>
      Math.sin(i * 0.7),
    )
    return Tensor.from(values, { shape, device })
  }

  it.each([
    ['nf4', nf4, 0.12],
    [
      'nf4 double',
      new BitsAndBytesConfig({ ...plain(nf4), bnb4bitQuantType: 'nf4', bnb4bitUseDoubleQuant: true }),
      0.12,
    ],
    ['fp4', new BitsAndBytesConfig({ loadIn4bit: true }), 0.16],
    ['int8', int8, 0.01],
    ['int8 kept in float', new BitsAndBytesConfig({ loadIn8bit: true, llmInt8HasFp16Weight: true }), 1e-7],
  ])('%s: quantises, frees the originals, and comes back', async (_, config, limit) => {
    const net = new Net()
    const originals = [net.fc1.weight.value, net.fc2.weight.value]
    const values = [await originals[0]!.floats(), await originals[1]!.floats()]
    const before = getTrueFootprint(net)
    const report = replaceWithQuantizedLinear(net, config)
    await net.checkFinite()
    expect(originals.map((tensor) => tensor.disposed)).toEqual([true, true])
    expect(report.replaced.map(({ path, from, shape }) => [path, from, shape])).toEqual([
      ['fc1', 'Linear', [64, 96]],
      ['fc2', 'Conv1D', [32, 64]],
    ])
    const saved = report.replaced.reduce((sum, r) => sum + r.bytesBefore - r.bytesAfter, 0)
    expect(before - getTrueFootprint(net)).toBe(saved)
    expect(net.numParameters()).toBe(64 * 97 + 32 * 65 + 7 * 33)

    const y = net.forward(ramp([5, 96]))
    expect(y.shape).toEqual([5, 7])
    const quantised = await y.floats()
    expect(dequantize(net)).toEqual(['fc1', 'fc2'])
    expect(kinds(net)).toEqual({ '': 'Net', fc1: 'Linear', fc2: 'Conv1D', lm_head: 'Linear' })
    expect(net.fc2.weight.value.shape).toEqual([64, 32])
    expect(relativeError(await net.fc1.weight.value.floats(), values[0]!)).toBeLessThan(limit)
    expect(relativeError(await net.fc2.weight.value.floats(), values[1]!)).toBeLessThan(limit)
    expect(getTrueFootprint(net)).toBe(before)
    const dense = await net.forward(ramp([5, 96])).floats()
    expect(relativeError(quantised, dense)).toBeLessThan(config.loadIn8bit ? 0.02 : 1e-5)
    expect(thrown(() => dequantize(net)).code).toBe('ERR_HALFBYTE_NO_LINEAR')
    net.dispose()
  })

  it('finds NaN and infinities by name, and the layers then refuse to run', async () => {
    for (const [config, value] of [
      [nf4, NaN],
      [int8, NaN],
      [nf4, Infinity],
      [int8, 1e6],
    ] as const) {
      const net = new Net()
      const bad = new Float32Array(64 * 96).fill(0.5)
      bad[1234] = value
      net.fc1.weight.load(Tensor.from(bad, { shape: [64, 96], device }))
      replaceWithQuantizedLinear(net, config)
      const error = await net.checkFinite().then(
        () => undefined,
        (e: unknown) => e as HalfbyteError,
      )
      expect(error?.code).toBe('ERR_HALFBYTE_VALUE')
      expect(error?.message).toMatch(/weights of fc1 \(\d+\):/)
      expect(thrown(() => net.forward(ramp([1, 96]))).message).toMatch(/fc1\.weight.*NaN or infinite/)
    }
  })

  it('names the layer when one is quantised alone', async () => {
    const layer = new Linear(4, 2, { device })
    layer.weight.load(Tensor.from(new Float32Array(8).fill(NaN), { shape: [2, 4], device }))
    await expect(Linear4bit.quantize(layer)).rejects.toThrow(/Linear4bit \(8\)/)
    await expect(Linear8bit.quantize(layer)).rejects.toThrow(/Linear8bit/)
  })

  it('leaves a parameter of its own kind alone', () => {
    class Odd extends Module {
      fc = new Linear(4, 4, { device })
      scale = new Parameter([4], { init: () => new Float32Array(4), device })
      forward(): void {}
    }
    const model = new Odd()
    replaceWithQuantizedLinear(model, int8)
    expect(model.scale.isLoaded).toBe(true)
  })
})
