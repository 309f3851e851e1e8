/**
 * Products one behind the other in a graph that is replayed often: the kernels of a GPU start early, divide a product among
 * blocks and leave counters for the next one, and what they give must not depend on that.
 */
import { devices, nn, Tensor } from '../../lib/index'
import { noise } from '../support/reference'

const bytes = async (tensor: Tensor): Promise<Buffer> => Buffer.from((await tensor.data()).buffer)

describe.each(devices())('replayed products on %s', (on) => {
  const gpu = on.type === 'cuda'
  const [n, k, together, replays] = gpu ? [4096, 512, 16, 100] : [64, 128, 4, 5]
  const make = {
    '4 bits': (linear: nn.Linear) => nn.Linear4bit.fromLinear(linear),
    '4 bits, nested': (linear: nn.Linear) => nn.Linear4bit.fromLinear(linear, { compressStatistics: true }),
    int8: (linear: nn.Linear) => nn.Linear8bit.fromLinear(linear, { threshold: 6 }),
  }

  describe.each(Object.entries(make))('%s', (_, layerOf) => {
    it.each([1, 8, 40, 100, 128, 300, 520])('%i rows', async (m) => {
      const linear = new nn.Linear(k, n, { dtype: 'bfloat16', device: on })
      const layer = layerOf(linear)
      const numbers = noise(m * k, m)
      for (let column = 5; column < k; column += 97) numbers[(column % m) * k + column] = 9
      using x = Tensor.from(numbers, { shape: [m, k], device: on }).to('bfloat16')
      using first = layer.forward(x)
      const expected = await bytes(first)
      const results: Tensor[] = []
      using graph = on.capture(() => {
        for (let i = 0; i < together; i++) results.push(layer.forward(x))
      })
      for (let i = 0; i < replays; i++) graph.replay()
      for (const y of results) expect(expected.equals(await bytes(y))).toBe(true)
      for (const y of results) y.dispose()
      layer.dispose()
    })
  })
})
