import { inspect } from 'node:util'
import {
  Embedding,
  HalfbyteError,
  Linear,
  Module,
  ModuleList,
  Parameter,
  Sequential,
  Tensor,
  dequantize,
  device,
  dispatchModel,
  manualSeed,
  nn,
  onMeta,
  replaceWithQuantizedLinear,
  tidy,
} from '../../lib/index.js'
import { rejection, thrown } from '../support/errors.js'

class Block extends Module {
  up: Linear
  down: Linear
  scale = Tensor.from([1, 2, 3], { device: 'cpu' })
  readonly _cache = Tensor.from([9], { device: 'cpu' })

  constructor(hidden: number) {
    super()
    this.up = new Linear(hidden, 2 * hidden, { bias: false })
    this.down = new Linear(2 * hidden, hidden)
  }

  forward(x: Tensor): Tensor {
    return this.down.forward(this.up.forward(x))
  }
}

class Net extends Module {
  embed = new Embedding(10, 4)
  layers = new ModuleList([new Block(4), new Block(4)])
  extra = [new Linear(4, 4)]
  positions = nn.Buffer.of(Tensor.from([0, 1, 2], { device: 'cpu' }), { persistent: false })
  mask = nn.Buffer.of(Tensor.from(Uint8Array.of(1, 0), { device: 'cpu' }))
  head = new Linear(4, 10, { bias: false })

  constructor() {
    super()
    this.head.weight = this.embed.weight
  }

  forward(x: Tensor): Tensor {
    return x
  }
}

it('a module that is a part of itself says where, and can be printed', async () => {
  class Part extends Module {
    layer = new Linear(2, 2, { device: 'cpu' })
    parent?: Module
    forward() {}
  }
  class Whole extends Module {
    parts = [new Part(), new Part()]
    forward() {}
  }
  const whole = new Whole()
  whole.parts[1]!.parent = whole
  const error = await rejection(whole.stateDict())
  expect(error.code).toBe('ERR_HALFBYTE_USAGE')
  expect(error.message).toContain('parts.1.parent is the Whole that it is a part of')
  expect(thrown(() => replaceWithQuantizedLinear(whole, { loadIn4bit: true })).code).toBe(error.code)
  expect(thrown(() => dispatchModel(whole, { '': 'cpu' })).code).toBe(error.code)
  expect(whole.parts[0]!.layer.weight.dtype).toBe('float32')
  expect(String(whole)).toContain('(parent): Whole(...)')
  expect(whole.numParameters()).toBe(12)
})

describe('what is none', () => {
  const wrong = [undefined, null, 3, 'x', {}] as never[]
  const layer = () => new Linear(2, 2, { device: 'cpu' })

  it('of a place to move to', () => {
    for (const target of [undefined, null, 0, true, 3n] as never[])
      expect(thrown(() => layer().to(target)).message).toContain('neither a dtype nor a device')
  })

  it('of a model', () => {
    for (const model of wrong) {
      const config = { loadIn4bit: true }
      expect(thrown(() => replaceWithQuantizedLinear(model, config)).message).toContain('must be a Module')
      expect(thrown(() => dequantize(model)).code).toBe('ERR_HALFBYTE_VALUE')
    }
  })

  it('of a state dict', async () => {
    for (const state of [
      ...wrong,
      [1] as never,
      { weight: Tensor.zeros([2, 2], 'float32', 'cpu') } as never,
    ]) {
      const error = await rejection(layer().loadStateDict(state))
      expect(error.code).toBe('ERR_HALFBYTE_STATE_DICT')
      expect(error.message).toContain('new Map(Object.entries(tensors))')
    }
  })
})

describe('Module', () => {
  const names = [
    'embed.weight',
    'layers.0.scale',
    'layers.0.up.weight',
    'layers.0.down.weight',
    'layers.0.down.bias',
    'layers.1.scale',
    'layers.1.up.weight',
    'layers.1.down.weight',
    'layers.1.down.bias',
    'extra.0.weight',
    'extra.0.bias',
  ]

  it('registers what is assigned to properties, tied parameters once', () => {
    const net = new Net()
    expect([...net.namedParameters()].map(([name]) => name).sort()).toEqual([...names].sort())
    expect([...net.namedParameters({ removeDuplicate: false })].map(([name]) => name)).toContain(
      'head.weight',
    )
    expect([...net.namedBuffers()].map(([name]) => name)).toEqual(['positions', 'mask'])
    expect([...net.namedModules()].map(([name]) => name)).toEqual([
      '',
      'embed',
      'layers',
      'layers.0',
      'layers.0.up',
      'layers.0.down',
      'layers.1',
      'layers.1.up',
      'layers.1.down',
      'extra.0',
      'head',
    ])
    expect(net.numParameters()).toBe(40 + 2 * (3 + 32 + 32 + 4) + 16 + 4)
  })

  it('finds and replaces modules by path', () => {
    const net = new Net()
    expect(net.getSubmodule('')).toBe(net)
    expect(net.getSubmodule('layers.1.up')).toBe(net.layers.at(1)!.up)
    expect(net.getSubmodule('extra.0')).toBe(net.extra[0])
    const other = new Linear(4, 8)
    net.setSubmodule('layers.1.up', other)
    expect(net.layers.at(1)!.up).toBe(other)
    net.setSubmodule('extra.0', other)
    expect(net.extra[0]).toBe(other)
    const block = new Block(4)
    net.setSubmodule('layers.0', block)
    expect(net.layers.at(0)).toBe(block)
    const error = thrown(() => net.getSubmodule('layers.0.gate'))
    expect(error.code).toBe('ERR_HALFBYTE_VALUE')
    expect(error.message).toMatch(/layers\.0\.gate.*Block has up, down/)
    expect(() => net.setSubmodule('', other)).toThrow(/model itself/)
  })

  it('visits children before parents in apply(), and sets the training flag', () => {
    const order: string[] = []
    const net = new Sequential(new Sequential(new Linear(2, 2)), new Linear(2, 3)).apply((m) =>
      order.push(m.constructor.name),
    )
    expect(order).toEqual(['Linear', 'Linear', 'Sequential', 'Sequential'])
    net.train()
    expect(net.modules().every((m) => m.training)).toBe(true)
    net.eval()
    expect(net.modules().some((m) => m.training)).toBe(false)
  })

  it('frees every parameter, and nothing that a tidy() around it would free', () => {
    const net = tidy(() => new Net())
    expect(net.embed.weight.value.disposed).toBe(false)
    const tensors = [...net.namedParameters()].map(([, parameter]) => parameter.value)
    net.dispose()
    expect(tensors.every((tensor) => tensor.disposed)).toBe(true)
    expect(thrown(() => net.head.weight.value).code).toBe('ERR_HALFBYTE_DISPOSED')
  })

  it('casts float parameters and keeps ties and buffers', () => {
    const net = new Net().to('bfloat16')
    expect(net.head.weight.value).toBe(net.embed.weight.value)
    expect(new Set([...net.namedParameters()].map(([, p]) => p.dtype))).toEqual(new Set(['bfloat16']))
    expect([...net.namedBuffers()].map(([, p]) => p.dtype)).toEqual(['float32', 'uint8'])
    expect(net.layers.at(0)!.scale.dtype).toBe('bfloat16')
    expect(thrown(() => net.to('int8')).code).toBe('ERR_HALFBYTE_DTYPE')
  })

  it('moves to another device of the process and keeps two tensors that are one', async () => {
    class Two extends Module {
      a = Tensor.from([1, 2], { device: 'cpu' })
      b = this.a
      forward(): void {}
    }
    const net = new Two().to('cpu:1')
    expect(net.a.device).toBe(device('cpu:1'))
    expect(net.b).toBe(net.a)
    expect([...(await net.a.floats())]).toEqual([1, 2])
    expect(net.numParameters()).toBe(2)
  })

  it('draws the same first values from the same seed, in the range of Kaiming uniform', async () => {
    manualSeed(7)
    const a = await new Linear(64, 32).weight.value.floats()
    manualSeed(7)
    const b = await new Linear(64, 32).weight.value.floats()
    const c = await new Linear(64, 32).weight.value.floats()
    expect(b).toEqual(a)
    expect(c).not.toEqual(a)
    const bound = 1 / Math.sqrt(64)
    expect(a.every((x) => Math.abs(x) <= bound)).toBe(true)
    const variance = a.reduce((sum, x) => sum + x * x, 0) / a.length
    expect(variance / (bound ** 2 / 3)).toBeGreaterThan(0.9)
    expect(variance / (bound ** 2 / 3)).toBeLessThan(1.1)
    const e = await new Embedding(100, 50).weight.value.floats()
    expect(Math.abs(e.reduce((sum, x) => sum + x * x, 0) / e.length - 1)).toBeLessThan(0.1)
  })

  it('refuses absurd sizes', () => {
    for (const make of [
      () => new Linear(0, 4),
      () => new Linear(4, -1),
      () => new Linear(2.5, 4),
      () => new Embedding(4, 0),
      () => new nn.RMSNorm(0),
    ]) {
      expect(thrown(make).code).toBe('ERR_HALFBYTE_SHAPE')
    }
  })
})

describe('state dicts', () => {
  it('round-trip, strictly, with tied names on both sides', async () => {
    const [from, to] = [new Net(), new Net()]
    const state = await from.stateDict()
    expect([...state.keys()]).toContain('head.weight')
    expect([...state.keys()]).toContain('mask')
    expect([...state.keys()]).not.toContain('positions')
    expect(state.get('head.weight')!.storageId).toBe(state.get('embed.weight')!.storageId)
    expect(await to.loadStateDict(state)).toEqual({ missing: [], unexpected: [] })
    expect(await to.layers.at(1)!.down.bias!.value.floats()).toEqual(
      await from.layers.at(1)!.down.bias!.value.floats(),
    )
    expect(to.head.weight.value).toBe(to.embed.weight.value)
    for (const tensor of state.values()) tensor.dispose()
    expect((await from.embed.weight.value.floats()).length).toBe(40)
  })

  it('a tied name may be left out', async () => {
    const state = await new Net().stateDict()
    state.delete('head.weight')
    expect(await new Net().loadStateDict(state)).toEqual({ missing: [], unexpected: [] })
  })

  it('lists everything that is wrong in one error, and changes nothing', async () => {
    const net = new Net()
    const before = await net.embed.weight.value.floats()
    const state = await new Net().stateDict()
    state.delete('layers.0.down.bias')
    state.set('layers.7.up.weight', Tensor.zeros([2]))
    state.set('layers.1.up.weight', Tensor.zeros([8, 5]))
    state.set('extra.0.weight', Tensor.zeros([4, 4], 'int32'))
    const error = await rejection(net.loadStateDict(state))
    expect(error).toBeInstanceOf(HalfbyteError)
    expect(error.code).toBe('ERR_HALFBYTE_STATE_DICT')
    expect(error.message).toContain('layers.0.down.bias is missing')
    expect(error.message).toContain('layers.7.up.weight is not in the model')
    expect(error.message).toContain('layers.1.up.weight has shape [8, 5], the model has [8, 4]')
    expect(error.message).toContain('extra.0.weight is int32, the model has float32')
    expect(await net.embed.weight.value.floats()).toEqual(before)

    const lenient = await rejection(net.loadStateDict(state, { strict: false }))
    expect(lenient.message).not.toContain('is missing')
    state.set('layers.1.up.weight', Tensor.zeros([8, 4], 'float16'))
    state.set('extra.0.weight', Tensor.zeros([4, 4]))
    expect(await net.loadStateDict(state, { strict: false })).toEqual({
      missing: ['layers.0.down.bias'],
      unexpected: ['layers.7.up.weight'],
    })
    expect(net.layers.at(1)!.up.weight.dtype).toBe('float32')
  })
})

describe('models without memory', () => {
  it('are built on meta and filled tensor by tensor', async () => {
    const net = onMeta(() => new Net(), { dtype: 'float16' })
    expect([...net.namedParameters()].some(([name, p]) => p.isLoaded && !name.endsWith('scale'))).toBe(false)
    expect(net.embed.weight.nbytes).toBe(80)
    expect(() =>
      net.layers
        .at(0)!
        .up.namePaths()
        .forward(Tensor.zeros([1, 4])),
    ).toThrow(/used before it is loaded/)
    expect(net.missingParameters()).toEqual([
      'embed.weight',
      'layers.0.up.weight',
      'layers.0.down.weight',
      'layers.0.down.bias',
      'layers.1.up.weight',
      'layers.1.down.weight',
      'layers.1.down.bias',
      'extra.0.weight',
      'extra.0.bias',
    ])
    for (const [name, tensor] of await new Net().stateDict()) await net.loadParameter(name, tensor)
    expect(net.missingParameters()).toEqual([])
    expect(net.embed.weight.value.dtype).toBe('float16')
    expect(net.head.weight.value).toBe(net.embed.weight.value)
  })

  it('take the dtype that arrives where none was declared', async () => {
    const linear = new Linear(3, 2, { device: 'meta', bias: false })
    expect(linear.weight.dtype).toBeUndefined()
    await linear.loadParameter('weight', Tensor.zeros([2, 3], 'bfloat16'))
    expect(linear.weight.dtype).toBe('bfloat16')
  })

  it('say by name what cannot be loaded', async () => {
    const net = onMeta(() => new Net())
    expect(net.acceptsParameter('layers.0.up.weight')).toBe(true)
    expect(net.acceptsParameter('layers.0.up.bias')).toBe(false)
    expect(net.acceptsParameter('layers.9.up.weight')).toBe(false)
    const unknown = await rejection(net.loadParameter('layers.0.up.bias', Tensor.zeros([8])))
    expect(unknown.code).toBe('ERR_HALFBYTE_STATE_DICT')
    expect(unknown.message).toMatch(/no 'layers\.0\.up\.bias'.*Linear has weight/)
    const shape = await rejection(net.loadParameter('layers.0.up.weight', Tensor.zeros([4, 8])))
    expect(shape.message).toBe('layers.0.up.weight has shape [4, 8], the model has [8, 4]')
    expect(() => net.layers.at(0)!.up.weight.value).toThrow(/^layers\.0\.up\.weight \[8, 4\] is used before/)
  })

  it('a Parameter of its own starts without value', () => {
    const parameter = new Parameter([2, 3])
    expect(parameter.isLoaded).toBe(false)
    expect(thrown(() => parameter.value).code).toBe('ERR_HALFBYTE_STATE_DICT')
  })
})

describe("names other than the properties'", () => {
  class Renamed extends Module {
    protected override _names = { proj: 'c_proj', parts: 'h', body: 'model.decoder', scale: 'g' }
    proj = new Linear(2, 3)
    parts = [new Linear(3, 3, { bias: false })]
    body = new Sequential(new Linear(3, 1, { bias: false }))
    scale = Tensor.from([1], { device: 'cpu' })

    forward(x: Tensor): Tensor {
      return x
    }
  }

  it('are those of paths, state dicts and loading', async () => {
    using model = new Renamed()
    const names = ['g', 'c_proj.weight', 'c_proj.bias', 'h.0.weight', 'model.decoder.0.weight']
    expect([...model.namedParameters()].map(([name]) => name)).toEqual(names)
    const state = await model.stateDict()
    expect([...state.keys()].sort()).toEqual([...names].sort())
    for (const tensor of state.values()) tensor.dispose()
    expect(model.getSubmodule('model.decoder.0')).toBe(model.body.at(0))
    await model.loadParameter('g', Tensor.from([7], { device: 'cpu' }))
    expect(Array.from(await model.scale.floats())).toEqual([7])
  })

  it('are where modules are replaced', () => {
    using model = new Renamed()
    const paths = ['c_proj', 'h.0', 'model.decoder']
    for (const path of paths) {
      const old = model.getSubmodule(path)
      const put = new Linear(1, 1)
      model.setSubmodule(path, put)
      expect(model.getSubmodule(path)).toBe(put)
      old.dispose()
    }
    expect(model.proj).toBe(model.getSubmodule('c_proj'))
    expect(model.parts[0]).toBe(model.getSubmodule('h.0'))
    expect(() => model.setChild('proj', new Linear(1, 1))).toThrow(/no child 'proj'/)
  })
})

test('a module is printed as its tree, a run of equal children once', () => {
  class Tree extends Module {
    embed = new Embedding(10, 4)
    layers = new ModuleList([new Linear(4, 4), new Linear(4, 4), new Linear(4, 2, { bias: false })])
    norm = new nn.RMSNorm(4)
    forward(): void {}
  }
  using tree = new Tree()
  const text = `Tree(
  (embed): Embedding(10, 4)
  (layers): ModuleList(
    (0-1): 2 x Linear(4, 4)
    (2): Linear(4, 2, no bias)
  )
  (norm): RMSNorm(weight: float32 [4])
)`
  expect(String(tree)).toBe(text)
  expect(inspect(tree)).toBe(text)
  const { weight } = tree.norm
  const { name } = weight.device!
  expect(inspect(weight)).toBe(`Parameter(float32 [4], on ${name})`)
  expect(inspect(weight.device)).toBe(`Device(${name})`)
})
