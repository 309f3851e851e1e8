/** Experts in one tensor, and taken apart. */
import {
  dequantize,
  devices,
  FusedExperts,
  getMemoryFootprint,
  getTrueFootprint,
  Linear4bit,
  loadCheckpoint,
  Module,
  onMeta,
  ops,
  replaceWithQuantizedLinear,
  saveStateDict,
  SplitExperts,
  Tensor,
  type BitsAndBytesConfigOptions,
  type Placement,
} from '../../lib/index.js'
import { rejection } from '../support/errors.js'
import { temporaryFolder } from '../support/files.js'
import { baselineMemory } from '../support/memory.js'
import { noise, relativeError } from '../support/reference.js'

const [count, hiddenSize, intermediateSize] = [3, 64, 32]
const activation = (x: Tensor) => ops.activation(x.slice(1, 0, intermediateSize), 'gelu')

class Net extends Module {
  experts: FusedExperts | SplitExperts

  constructor(options: { device?: Placement; bias?: boolean } = {}) {
    super()
    const bias = options.bias ?? true
    this.experts = new FusedExperts({ count, hiddenSize, intermediateSize, activation, ...options, bias })
  }

  forward(expert: number, x: Tensor): Tensor {
    return this.experts.run(expert, x)
  }
}

const kinds: [string, BitsAndBytesConfigOptions, number][] = [
  ['nf4', { loadIn4bit: true, bnb4bitQuantType: 'nf4', bnb4bitUseDoubleQuant: true }, 1e-5],
  ['int8', { loadIn8bit: true }, 0.02],
]

describe.each(devices())('experts on %s', (device) => {
  const folder = temporaryFolder()
  const input = () => Tensor.from(noise(5 * hiddenSize), { shape: [5, hiddenSize], device })
  const results = async (net: Net) => {
    using x = input()
    return await Promise.all(
      Array.from({ length: count }, async (_, e) => {
        using y = net.forward(e, x)
        return await y.floats()
      }),
    )
  }

  it('compute their part of the tensors', async () => {
    using net = new Net({ device })
    const {
      gate_up_proj: up,
      gate_up_proj_bias: upBias,
      down_proj: down,
      down_proj_bias: downBias,
    } = net.experts as FusedExperts
    const [w1, b1, w2, b2] = await Promise.all([up, upBias!, down, downBias!].map((p) => p.value.floats()))
    const x = noise(5 * hiddenSize)
    const both = 2 * intermediateSize
    for (const [e, actual] of (await results(net)).entries()) {
      const expected = new Float32Array(5 * hiddenSize)
      for (let t = 0; t < 5; t++) {
        const inner = Float64Array.from({ length: intermediateSize }, (_, j) => {
          let sum = b1![e * both + j]!
          for (let i = 0; i < hiddenSize; i++)
            sum += x[t * hiddenSize + i]! * w1![(e * hiddenSize + i) * both + j]!
          return 0.5 * sum * (1 + erf(sum / Math.SQRT2))
        })
        for (let j = 0; j < hiddenSize; j++) {
          let sum = b2![e * hiddenSize + j]!
          inner.forEach((v, i) => (sum += v * w2![(e * intermediateSize + i) * hiddenSize + j]!))
          expected[t * hiddenSize + j] = sum
        }
      }
      expect(relativeError(actual, expected)).toBeLessThan(1e-5)
    }
  })

  describe.each(kinds)('in %s', (name, config, limit) => {
    it('are quantised one by one, freed, and put together again', async () => {
      using net = new Net({ device })
      const before = getTrueFootprint(net)
      const fused = net.experts
      const report = replaceWithQuantizedLinear(net, config)
      await net.checkFinite()
      expect(report.replaced.map(({ path, from, shape }) => [path, from, shape])).toEqual([
        ...[0, 1, 2].map((e) => [`experts.gate_up_projs.${e}`, 'FusedExperts', [64, 64]]),
        ...[0, 1, 2].map((e) => [`experts.down_projs.${e}`, 'FusedExperts', [64, 32]]),
      ])
      expect((fused as FusedExperts).down_proj.isLoaded).toBe(false)
      const saved = report.replaced.reduce((sum, r) => sum + r.bytesBefore - r.bytesAfter, 0)
      expect(before - getTrueFootprint(net)).toBe(saved)
      expect(net.numParameters()).toBe(count * (64 * 64 + 64 + 32 * 64 + 64))
      const quantised = await results(net)
      expect(dequantize(net)).toEqual(report.replaced.map(({ path }) => path))
      expect(net.experts).toBeInstanceOf(FusedExperts)
      expect(getMemoryFootprint(net)).toBe(before)
      const dense = await results(net)
      dense.forEach((y, e) => expect(relativeError(quantised[e]!, y)).toBeLessThan(limit))
    })

    it.each([true, false])(
      'are quantised as they are loaded, and loaded quantised; bias %s',
      async (bias) => {
        const [plain, packed] = [`plain-${name}-${bias}`, `packed-${name}-${bias}`].map(
          (at) => `${folder}/${at}`,
        )
        using source = new Net({ device, bias })
        const state = await source.stateDict()
        expect([...state.keys()]).toContain('experts.gate_up_proj')
        await saveStateDict(plain!, state)
        using loaded = onMeta(() => new Net({ bias }))
        await loadCheckpoint(loaded, plain!, { device, quantizationConfig: config })
        replaceWithQuantizedLinear(source, config)
        const expected = await results(source)
        expect(await results(loaded)).toEqual(expected)

        const parts = await loaded.stateDict()
        const names = [...parts.keys()]
        expect(names).toContain('experts.gate_up_projs.2.weight')
        expect(names.includes('experts.down_projs.0.bias')).toBe(bias)
        await saveStateDict(packed!, parts, { maxShardSize: 5000 })
        using again = onMeta(() => new Net({ bias }))
        const options = { device, quantizationConfig: config, prequantized: true }
        await loadCheckpoint(again, packed!, options)
        expect(await results(again)).toEqual(expected)
        expect(getTrueFootprint(again)).toBe(getTrueFootprint(loaded))

        const gone = new Map([...parts].filter(([key]) => !key.startsWith('experts.down_projs.1.')))
        await saveStateDict(packed!, gone)
        const error = await rejection(
          loadCheckpoint(
            onMeta(() => new Net({ bias })),
            packed!,
            options,
          ),
        )
        expect(error.message).toMatch(/lacks 1 tensor|lacks 2 tensors/)
        expect(error.message).toContain('experts.down_projs.1.weight')
        for (const tensor of [...state.values(), ...parts.values()]) tensor.dispose()
      },
    )
  })

  it.each([undefined, ...kinds.map(([, config]) => config)])(
    'are loaded in the memory of the result and one tensor: %j',
    async (quantizationConfig) => {
      const [hidden, inner] = [256, 128]
      const build = () =>
        onMeta(() => {
          const sizes = { count: 16, hiddenSize: hidden, intermediateSize: inner, bias: true }
          const net = new Net()
          net.experts = new FusedExperts({ ...sizes, activation })
          return net
        })
      const at = `${folder}/large`
      const zeros = (...shape: number[]) => Tensor.full(shape, 0.5, 'float32', device)
      const state = new Map([
        ['experts.gate_up_proj', zeros(16, hidden, 2 * inner)],
        ['experts.gate_up_proj_bias', zeros(16, 2 * inner)],
        ['experts.down_proj', zeros(16, inner, hidden)],
        ['experts.down_proj_bias', zeros(16, hidden)],
      ])
      await saveStateDict(at, state)
      for (const tensor of state.values()) tensor.dispose()
      const largest = 16 * hidden * 2 * inner * 4
      const before = await baselineMemory(device)
      using net = build()
      await loadCheckpoint(net, at, { device, quantizationConfig })
      const result = getTrueFootprint(net)
      expect(device.memoryUsage().peak - before).toBeLessThan(result + largest * 1.35 + 65536)
      expect(device.memoryUsage().allocated - before).toBeLessThan(result * 1.05 + 65536)
    },
  )

  it('stay in one tensor where a list says so, and move', async () => {
    using net = new Net({ device })
    const config = { loadIn4bit: true } as const
    const error = await rejection(
      Promise.resolve().then(() =>
        replaceWithQuantizedLinear(net, config, { modulesToNotConvert: ['experts'] }),
      ),
    )
    expect(error.message).toMatch(/experts: named by 'experts'/)
    const before = await results(net)
    net.to(device)
    expect(await results(net)).toEqual(before)
    net.to('float16')
    expect((net.experts as FusedExperts).down_proj.dtype).toBe('float16')
    const half = await results(net)
    half.forEach((y, e) => expect(relativeError(y, before[e]!)).toBeLessThan(2e-3))
  })

  it('lose nothing when they are moved after they were quantised', async () => {
    using net = new Net({ device })
    replaceWithQuantizedLinear(net, { loadIn4bit: true })
    const before = await results(net)
    net.to('cpu').to(device)
    expect(await results(net)).toEqual(before)
    expect(net.modules().filter((module) => module instanceof Linear4bit).length).toBe(2 * count)
  })
})

/** By its Taylor series, which converges well for the small arguments of these tests. */
function erf(x: number): number {
  let [term, sum] = [x, x]
  for (let n = 1; n < 60; n++) {
    term *= (-x * x) / n
    sum += term / (2 * n + 1)
  }
  return (2 / Math.sqrt(Math.PI)) * sum
}
