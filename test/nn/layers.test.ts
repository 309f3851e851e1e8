import {
  Conv1D,
  devices,
  Embedding,
  LayerNorm,
  Linear,
  nn,
  RMSNorm,
  Sequential,
  Tensor,
} from '../../lib/index.js'
import { expectClose, noise, rounded } from '../support/reference.js'

describe.each(devices())('layers on %s', (device) => {
  const tensor = (values: Float32Array, ...shape: number[]) => Tensor.from(values, { shape, device })

  it('Linear and Conv1D are one product with the weight either way round', async () => {
    const linear = new Linear(6, 4, { device })
    const conv = new Conv1D(6, 4, { device: 'meta' })
    expect(conv.weight.shape).toEqual([6, 4])
    const turned = linear.weight.value.transpose(0, 1)
    await conv.loadParameter('weight', turned.clone())
    await conv.loadParameter('bias', linear.bias!.value.share())
    const x = tensor(noise(18), 3, 6)
    const y = await linear.forward(x).floats()
    expectClose(await conv.forward(x).floats(), y)
    expect(await conv.weight.value.floats()).toEqual(await turned.floats())
    const residual = tensor(noise(12, 9), 3, 4)
    const sum = Float32Array.from(await residual.floats(), (r, i) => r + y[i]!)
    expectClose(await linear.forward(x, residual).floats(), sum)
    expectClose(await conv.forward(x, residual).floats(), sum)
    const state = await conv.stateDict()
    expect(state.get('weight')!.shape).toEqual([6, 4])
    await new Conv1D(6, 4, { device }).loadStateDict(state)
  })

  it('Conv1D keeps its weight as the product wants it: drawn, loaded, cast and moved', async () => {
    const conv = new Conv1D(6, 4, { device })
    const isLaid = () => conv.weight.value.transpose(0, 1).isContiguous
    expect(isLaid()).toBe(true)
    const before = await conv.weight.value.floats()
    conv.to('bfloat16')
    expect([isLaid(), conv.weight.value.shape, conv.weight.dtype]).toEqual([true, [6, 4], 'bfloat16'])
    conv.to({ dtype: 'float32', device })
    expect(isLaid()).toBe(true)
    expectClose(await conv.weight.value.floats(), before, 4e-3)
    const values = noise(24, 2)
    await conv.to('float16').loadParameter('weight', tensor(values, 6, 4))
    expect([isLaid(), conv.weight.dtype]).toEqual([true, 'float16'])
    expectClose(await conv.weight.value.floats(), values, 1e-3)
  })

  it('norms', async () => {
    const x = noise(20, 3)
    const rows = [0, 1, 2, 3].map((i) => [...x.subarray(5 * i, 5 * i + 5)])
    const rms = new RMSNorm(5, { device, eps: 1e-3 })
    const wanted = rows.flatMap((row) => {
      const scale = 1 / Math.sqrt(row.reduce((s, v) => s + v * v, 0) / 5 + 1e-3)
      return row.map((v) => v * scale)
    })
    expectClose(await rms.forward(tensor(x, 4, 5)).floats(), wanted)
    const gemma = new RMSNorm(5, { device, eps: 1e-3, weightOffset: 1 })
    expect(await gemma.weight.value.floats()).toEqual(new Float32Array(5))
    expectClose(await gemma.forward(tensor(x, 4, 5)).floats(), wanted)
    const layer = new LayerNorm(5, { device, eps: 1e-3 })
    const normed = rows.flatMap((row) => {
      const mean = row.reduce((s, v) => s + v, 0) / 5
      const scale = 1 / Math.sqrt(row.reduce((s, v) => s + (v - mean) ** 2, 0) / 5 + 1e-3)
      return row.map((v) => (v - mean) * scale)
    })
    expectClose(await layer.forward(tensor(x, 4, 5)).floats(), normed)
    const bare = new LayerNorm(5, { device, eps: 1e-3, elementwiseAffine: false })
    expect(bare.numParameters()).toBe(0)
    const zero = tensor(new Float32Array(20), 4, 5)
    const { y, sum } = bare.forwardSum(zero, tensor(x, 4, 5))
    expectClose(await y.floats(), normed)
    expect(await sum.floats()).toEqual(x)
  })

  it('RMSNorm with bnbExact rounds before it multiplies by its weight', async () => {
    const norm = new RMSNorm(64, { device, dtype: 'float16' })
    norm.weight.replace(tensor(noise(64, 4), 64).to('float16'))
    const x = tensor(noise(192, 5), 3, 64).to('float16')
    const once = await norm.forward(x).floats()
    norm.bnbExact = true
    const twice = await norm.forward(x).floats()
    const plain = new RMSNorm(64, { device, dtype: 'float16' })
    const [normed, weight] = [await plain.forward(x).floats(), await norm.weight.value.floats()]
    const wanted = normed.map((v, i) => rounded(v * weight[i % 64]!, 'float16'))
    expect(twice).toEqual(wanted)
    expect(once).not.toEqual(wanted)
    for (const options of [{ weightOffset: 1 }, { roundsFirst: false }]) {
      const single = new RMSNorm(64, { device, dtype: 'float16', ...options })
      single.weight.replace(norm.weight.value.clone())
      const before = await single.forward(x).floats()
      single.bnbExact = true
      expect(await single.forward(x).floats()).toEqual(before)
    }
  })

  it('embeddings, and a chain that frees what lies between', async () => {
    const table = new Embedding(5, 8, { device })
    const chain = new Sequential(table, new Linear(8, 3, { device }), new nn.ReLU())
    const ids = Tensor.from(Int32Array.of(4, 0), { device })
    const y = chain.forward(ids)
    expect(y.shape).toEqual([2, 3])
    expect((await y.floats()).every((v) => v >= 0)).toBe(true)
    expect(ids.disposed).toBe(false)
    const rows = await table.forward(ids).floats()
    const weight = await table.weight.value.floats()
    expect([...rows]).toEqual([...weight.subarray(32, 40), ...weight.subarray(0, 8)])
  })
})
