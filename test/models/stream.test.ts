/** Layers on the CPU that multiply many rows on an accelerator. */
import {
  Conv1D,
  device,
  devices,
  dispatchModel,
  Linear,
  Linear4bit,
  Linear8bit,
  Sequential,
  Tensor,
} from '../../lib'
import { allocatedMemory, baselineMemory } from '../support/memory'
import { relativeError } from '../support/reference'

const gpus = devices()
  .filter(({ type }) => type === 'cuda')
  .map(({ name }) => name)

describe.each(['cpu:1', ...gpus])('layers on the CPU beside %s', (name) => {
  const accelerator = device(name)
  const k = 1024
  const input = (rows: number) =>
    Tensor.from(
      Float32Array.from({ length: rows * k }, (_, i) => Math.sin(i * 0.37)),
      { shape: [rows, k], device: 'cpu' },
    )

  it.each<[string, () => Linear]>([
    ['Linear', () => new Linear(k, k, { device: 'cpu' })],
    ['Conv1D', () => new Conv1D(k, k, { device: 'cpu' })],
    [
      'Linear4bit',
      () =>
        Linear4bit.fromLinear(new Linear(k, k, { device: 'cpu' }), {
          quantType: 'nf4',
          compressStatistics: true,
        }),
    ],
    [
      'Linear4bit of float16',
      () => Linear4bit.fromLinear(new Conv1D(k, k, { device: 'cpu' }), { computeDtype: 'bfloat16' }),
    ],
    [
      'Linear8bit',
      () => Linear8bit.fromLinear(new Linear(k, k, { device: 'cpu' }), { threshold: 0.99, bnbExact: true }),
    ],
    [
      'Linear8bit with float weights',
      () => Linear8bit.fromLinear(new Linear(k, k, { device: 'cpu' }), { hasFp16Weights: true }),
    ],
  ])('multiply many rows there: %s', async (_, make) => {
    const net = new Sequential(new Linear(k, k, { device: 'cpu' }), make())
    using few = input(2)
    using many = input(80)
    using added = Tensor.full([80, k], 3, 'float32', 'cpu')
    const layer = net.at(1) as Linear
    const run = async () =>
      [
        await layer.forward(few).data(),
        await layer.forward(many).data(),
        await layer.forward(many, added).data(),
      ] as Float32Array[]
    const wanted = await run()
    dispatchModel(net, { 0: name, 1: 'cpu' })
    expect(layer.weight.device!.name).toBe('cpu')
    const before = await baselineMemory(accelerator)
    layer.forward(few).dispose()
    await accelerator.synchronize()
    expect(accelerator.memoryUsage().peak).toBe(before)
    const found = await run()
    expect(accelerator.memoryUsage().peak - before).toBeGreaterThan((k * k) / 2)
    expect(await allocatedMemory(accelerator)).toBeLessThanOrEqual(before)
    found.forEach((values, i) => {
      if (accelerator.type === 'cpu') expect(values).toEqual(wanted[i])
      else expect(relativeError(values, wanted[i]!)).toBeLessThan(5e-3)
    })
    net.dispose()
  })

  it('but not where they have a forward() of their own', async () => {
    class Doubled extends Linear {
      override forward(x: Tensor, residual?: Tensor): Tensor {
        return super.forward(super.forward(x, residual))
      }
    }
    const net = new Sequential(new Linear(k, k, { device: 'cpu' }), new Doubled(k, k, { device: 'cpu' }))
    using many = input(80)
    const wanted = await net.at(1)!.forward(many as never)
    dispatchModel(net, { 0: name, 1: 'cpu' })
    const found = await net.at(1)!.forward(many as never)
    expect(await (found as Tensor).data()).toEqual(await (wanted as Tensor).data())
  })
})
