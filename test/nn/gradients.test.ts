/** Learning through layers: bitsandbytes' gradients, what learns and what does not, and models that are trained. */
import { join } from 'node:path'
import {
  AutoModelForCausalLM,
  dequantize,
  devices,
  functional,
  Linear,
  Linear4bit,
  Linear8bit,
  manualSeed,
  Module,
  noGrad,
  ops,
  Parameter,
  replaceWithQuantizedLinear,
  Sequential,
  Tensor,
  tidy,
} from '../../lib/index.js'
import { thrown } from '../support/errors.js'
import { temporaryFolder } from '../support/files.js'
import { readGolden } from '../support/golden.js'
import { noise, randn, relativeError } from '../support/reference.js'
import { writeTinyModel } from '../support/tiny_model.js'

const { add, int8Matmul, int8QuantizeRows, linear, mean, mul, sub } = ops

const linear4 = readGolden<{ case: number; K: number; N: number; bias: boolean; dtype: keyof typeof LIMIT }>(
  'linear4',
)
const int8 = readGolden<{ threshold: number; has_fp16_weights: boolean }>('int8_training')

/** bitsandbytes rounds the weight to the compute dtype before it multiplies; we do too. */
const LIMIT = { float32: 1e-5, float16: 1e-3, bfloat16: 8e-3 } as const

const root = temporaryFolder()
// what is small stays in memory
const folder = writeTinyModel(join(root, 'plain'), { hidden_size: 256, intermediate_size: 512 })
const tiedFolder = writeTinyModel(join(root, 'tied'), { tie_word_embeddings: true })

describe.each(devices())('gradients through layers on %s', (on) => {
  beforeEach(() => manualSeed(1))

  it.each(linear4.cases)("are bitsandbytes' for a 4-bit weight: case $case, $dtype", async (c) => {
    const tensor = (name: string) => linear4.tensor(`c${c.case}.${name}`, on.name)
    const layer = new Linear4bit(c.K, c.N, { bias: c.bias, device: 'meta', computeDtype: c.dtype })
    await layer.loadStateDict(
      new Map(linear4.names(`c${c.case}.state.`).map((name) => [name, tensor(`state.${name}`)])),
    )
    layer.to(on)
    const x = tensor('x')
    x.requiresGrad = true
    if (layer.bias) layer.bias.requiresGrad = true
    const dy = tensor('grad_y')
    layer.forward(x).backward(dy)
    expect(x.grad!.dtype).toBe(c.dtype)
    expect(relativeError(await x.grad!.floats(), await tensor('grad_x').floats())).toBeLessThan(
      LIMIT[c.dtype],
    )
    if (!layer.bias) return
    const ones = Tensor.full([1, dy.shape[0]!], 1, 'float32', on)
    const wanted = await linear(ones, dy.to('float32').transpose(0, 1)).floats()
    expect(relativeError(await layer.bias.grad!.floats(), wanted)).toBeLessThan(LIMIT[c.dtype])
  })

  describe("of LLM.int8() that keeps its weight in float16, against bitsandbytes'", () => {
    const { threshold } = int8.cases[0]!
    const tensor = (name: string) => int8.tensor(name, on.name)
    const [n, k] = int8.stored('w').shape as [number, number]

    async function trained() {
      const layer = new Linear8bit(k, n, { hasFp16Weights: true, threshold, bnbExact: true, device: 'meta' })
      await layer.loadStateDict(
        new Map(['w', 'bias'].map((name) => [name === 'w' ? 'weight' : name, tensor(name)])),
      )
      layer.to(on).requiresGrad_()
      const x = tensor('x')
      x.requiresGrad = true
      const y = layer.forward(x)
      y.backward(tensor('grad_y'))
      return { layer, x, y }
    }

    it('output, and gradients of input and bias', async () => {
      const { layer, x, y } = await trained()
      const error = async (found: Tensor, name: string) =>
        relativeError(await found.floats(), await tensor(name).floats())
      expect(await error(y, 'y')).toBeLessThan(5e-4)
      expect(await error(x.grad!, 'grad_x')).toBeLessThan(5e-4)
      expect(await layer.bias!.grad!.data()).toEqual(await tensor('grad_b').data())
    })

    it('weight: the true gradient, which theirs is not', async () => {
      const { layer } = await trained()
      const [dy, x] = [tensor('grad_y').to('float32'), tensor('x').to('float32')]
      const turned = (t: Tensor) => t.transpose(0, 1).contiguous()
      const exact = await linear(turned(dy), turned(x)).floats()
      expect(relativeError(await layer.weight.grad!.floats(), exact)).toBeLessThan(1e-3)

      // Theirs: codes by rows with the absmax of columns, times the codes of x [M, K] read as if they were [K, M],
      // plus the columns of outliers.
      const rows = int8QuantizeRows(dy, 0, true)
      const columns = int8QuantizeRows(turned(dy), 0, true)
      const below = Tensor.from(
        (await x.floats()).map((v) => (Math.abs(v) < threshold ? v : 0)),
        { shape: x.shape, device: on },
      )
      const outliers = int8QuantizeRows(x, threshold, true).outlierMask!.to('float32')
      const small = int8QuantizeRows(turned(below), 0, true)
      const misread = turned(small.codes).reshape(k, x.shape[0]!)
      const sums = int8Matmul(turned(rows.codes), misread).to('float32')
      const scaled = mul(mul(sums, columns.rowAbsmax.reshape(n, 1)), mul(small.rowAbsmax, 1 / 127 ** 2))
      const theirs = add(scaled, linear(turned(dy), turned(mul(x, outliers))))
      const golden = await tensor('grad_w').floats()
      expect(relativeError(await theirs.floats(), golden)).toBeLessThan(2e-3)
      expect(relativeError(exact, golden)).toBeGreaterThan(0.5)
    })
  })

  /** y = x W^T + 2 x A^T B^T with W frozen: LoRA (arXiv 2106.09685). */
  class Adapted extends Module {
    lora_A: Parameter
    lora_B: Parameter
    constructor(
      readonly _base: Linear,
      rank: number,
    ) {
      super()
      const made = (...shape: [number, number]) =>
        Tensor.from(randn(shape[0] * shape[1], 5), { shape, device: on })
      this.lora_A = Parameter.of(noGrad(() => mul(made(rank, _base.inFeatures), 0.1)))
      this.lora_B = Parameter.of(Tensor.zeros([_base.outFeatures, rank], 'float32', on))
    }
    forward(x: Tensor): Tensor {
      return add(this._base.forward(x), mul(linear(linear(x, this.lora_A.value), this.lora_B.value), 2))
    }
  }

  /** Steps of gradient descent towards the outputs of another layer; the loss before and after. */
  async function learn(net: Module, steps: number, rate: number): Promise<[number, number]> {
    const target = Tensor.from(noise(16 * 32), { shape: [16, 32], device: on })
    const x = Tensor.from(randn(64 * 32, 3), { shape: [64, 32], device: on })
    const losses: number[] = []
    for (let step = 0; step < steps; step++) {
      const loss = tidy(() => {
        const error = sub((net as unknown as Linear).forward(x), linear(x, target))
        const loss = mean(mul(error, error))
        loss.backward()
        return loss
      })
      noGrad(() =>
        tidy(() => {
          for (const { value } of net.parameters()) {
            if (value.grad) value.copyFrom(sub(value, mul(value.grad, rate)))
          }
        }),
      )
      net.zeroGrad()
      losses.push(await loss.item())
      loss.dispose()
    }
    return [losses[0]!, losses.at(-1)!]
  }

  it.each<[string, () => Module]>([
    ['a dense layer', () => new Linear(32, 16, { device: on })],
    [
      'an int8 layer that keeps its weight',
      () => new Linear8bit(32, 16, { hasFp16Weights: true, dtype: 'float32', device: on }),
    ],
    [
      'two layers',
      () => new Sequential(new Linear(32, 24, { device: on }), new Linear(24, 16, { device: on })),
    ],
  ])('teach %s', async (_, make) => {
    const net = make().requiresGrad_()
    const [before, after] = await learn(net, 60, 0.5)
    expect(after).toBeLessThan(before / 20)
  })

  it.each<[string, (dense: Linear) => Linear]>([
    ['4-bit', (dense) => Linear4bit.fromLinear(dense, { quantType: 'nf4', computeDtype: 'float32' })],
    ['int8', (dense) => Linear8bit.fromLinear(dense)],
  ])('teach an adapter beside a frozen %s layer', async (_, quantize) => {
    const base = quantize(new Linear(32, 16, { device: on }))
    const codes = await base.weight.value.data()
    const net = new Adapted(base, 16).requiresGrad_()
    const [before, after] = await learn(net, 200, 0.2)
    expect(after).toBeLessThan(before / 10)
    expect(await base.weight.value.data()).toEqual(codes)
    expect(base.bias!.grad).toBeUndefined()
  })

  describe('of modules', () => {
    it('stay wanted when the model moves or is loaded, and are in no state dict', async () => {
      const net = new Linear(8, 4, { device: on }).requiresGrad_()
      expect(net.weight.requiresGrad).toBe(true)
      net.to('bfloat16')
      expect([net.weight.value.requiresGrad, net.weight.value.dtype]).toEqual([true, 'bfloat16'])
      const state = await net.stateDict()
      for (const tensor of state.values()) expect(tensor.requiresGrad).toBe(false)
      await net.loadStateDict(state)
      expect(net.weight.value.requiresGrad).toBe(true)
      const late = new Linear(8, 4, { device: 'meta' }).requiresGrad_()
      await late.loadStateDict(state)
      expect(late.weight.value.requiresGrad).toBe(true)
      net.requiresGrad_(false)
      expect(net.forward(Tensor.zeros([1, 8], 'bfloat16', on)).requiresGrad).toBe(false)
    })

    it('are refused for quantised weights, by name, and nothing is changed', () => {
      const net = new Sequential(new Linear(64, 64, { device: on }), new Linear(64, 32, { device: on }))
      replaceWithQuantizedLinear(net, { loadIn4bit: true }, { modulesToNotConvert: ['0'] })
      const error = thrown(() => net.requiresGrad_())
      expect(error.code).toBe('ERR_HALFBYTE_DTYPE')
      expect(error.message).toMatch(/requiresGrad: 1.weight is uint8, which has no gradient/)
      expect(net.parameters().map((parameter) => parameter.requiresGrad)).toEqual([
        false,
        false,
        false,
        false,
      ])
      // quantising a weight that learns is no part of learning
      const dense = new Linear(64, 64, { device: on }).requiresGrad_()
      expect(Linear4bit.fromLinear(dense).forward(Tensor.zeros([1, 64], 'float32', on)).requiresGrad).toBe(
        true,
      )
      dense.bias!.requiresGrad = false
      for (const kind of [Linear4bit, Linear8bit]) {
        const quantized = kind.fromLinear(dense)
        expect(quantized.forward(Tensor.zeros([1, 64], 'float32', on)).requiresGrad).toBe(false)
      }
    })

    it('go with what is learnt, wherever it is held', async () => {
      class Scaled extends Module {
        scale = Tensor.from([1, 2], { device: on })
        forward(x: Tensor): Tensor {
          return mul(x, this.scale)
        }
      }
      const net = new Scaled().requiresGrad_()
      net.forward(Tensor.from([3, 4], { device: on })).backward(Tensor.from([1, 1], { device: on }))
      net.to('bfloat16')
      expect([net.scale.requiresGrad, net.scale.dtype, net.scale.grad!.dtype]).toEqual([
        true,
        'bfloat16',
        'bfloat16',
      ])
      expect(await net.scale.grad!.floats()).toEqual(Float32Array.of(3, 4))

      // a state dict of what is learnt elsewhere, the result of an op: values, without the way back
      const [source, target] = [
        new Linear(2, 2, { device: on }).requiresGrad_(),
        new Linear(2, 2, { device: on }),
      ]
      await target.loadStateDict(
        new Map([...source.namedParameters()].map(([name, { value }]) => [name, value])),
      )
      expect(target.weight.requiresGrad).toBe(false)
      const made = Parameter.of(mul(source.weight.value, 2))
      expect([made.requiresGrad, made.value.isLeaf]).toEqual([false, true])
      source.weight.load(sub(source.weight.value, 1))
      expect([source.weight.requiresGrad, source.weight.value.isLeaf]).toEqual([true, true])
    })

    it('stay wanted of an int8 layer that keeps its weight, there and back', () => {
      const net = new Sequential(
        new Linear(8, 8, { device: on }),
        new Linear(8, 4, { device: on }),
      ).requiresGrad_()
      const wanted = () => net.parameters().map((parameter) => parameter.requiresGrad)
      replaceWithQuantizedLinear(net, { loadIn8bit: true, llmInt8HasFp16Weight: true })
      expect(net.at(0)).toBeInstanceOf(Linear8bit)
      expect(wanted()).toEqual([true, true, true, true])
      dequantize(net)
      expect(wanted()).toEqual([true, true, true, true])
    })

    it('go to the weight of functional.matmul()', async () => {
      const [x, w] = [
        Tensor.from(randn(40, 1), { shape: [5, 8], device: on }),
        Tensor.from(randn(24, 2), { shape: [3, 8], device: on }),
      ]
      w.requiresGrad = true
      const dy = Tensor.from(randn(15, 3), { shape: [5, 3], device: on })
      functional.matmul(x, w, { threshold: 6 }).backward(dy)
      const exact = await linear(dy.transpose(0, 1), x.transpose(0, 1)).floats()
      expect(relativeError(await w.grad!.floats(), exact)).toBeLessThan(1e-6)
    })

    it('are refused for what is not in memory, or on several devices', async () => {
      const deviceMap = { '': on.name, 'model.layers.1': 'disk' }
      using parts = await AutoModelForCausalLM.fromPretrained(folder, { deviceMap })
      const error = thrown(() => parts.requiresGrad_())
      expect(error.code).toBe('ERR_HALFBYTE_USAGE')
      expect(error.message).toMatch(/model.layers.1.*weight has no gradient: it lies on the disk/)
      const other = on.name === 'cpu' ? 'cpu:1' : 'cpu'
      const tied = { deviceMap: { '': on.name, lm_head: other } }
      using spread = await AutoModelForCausalLM.fromPretrained(tiedFolder, tied)
      expect(thrown(() => (spread.model.embed_tokens.weight.requiresGrad = true)).message).toMatch(
        /has it on several devices, and what the copies learn would be lost/,
      )
    })

    it('are not in the way of generating, nor of measuring', async () => {
      using model = await AutoModelForCausalLM.fromPretrained(folder, { device: on })
      const ids = [3, 1, 4, 1, 5]
      const [before, loss] = [await model.generate(ids, { maxNewTokens: 4 }), await model.loss(ids)]
      model.requiresGrad_()
      expect((await model.generate(ids, { maxNewTokens: 4 })).tokenIds).toEqual(before.tokenIds)
      expect(await model.loss(ids)).toBe(loss)
      expect(thrown(() => model.forward(ids)).code).toBe('ERR_HALFBYTE_UNSUPPORTED')
    })
  })
})
