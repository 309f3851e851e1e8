/** What an op says of operands that are none, and operands that lie in memory in unusual ways. */
import { device, devices, functional, nn, ops, Tensor } from '../../lib/index'
import { thrown } from '../support/errors'
import { baselineMemory } from '../support/memory'

const t = (shape: number[], dtype: 'float32' | 'int32' | 'uint8' | 'int64' = 'float32') =>
  Tensor.from(
    Array.from({ length: shape.reduce((a, b) => a * b, 1) }, (_, i) => i % 5),
    { shape, dtype, device: 'cpu' },
  )

describe('what is no tensor is refused by name', () => {
  const wrong = [undefined, null, 3, 'x', [1, 2, 3], Float32Array.of(1, 2), {}] as unknown as Tensor[]
  const calls: [string, (bad: Tensor) => unknown][] = [
    ['linear x', (bad) => ops.linear(bad, t([3, 2]))],
    ['linear weight', (bad) => ops.linear(t([1, 2]), bad)],
    ['add', (bad) => ops.add(bad, 1)],
    ['activation', (bad) => ops.activation(bad, 'silu')],
    ['argmax', (bad) => ops.argmax(bad)],
    ['concat', (bad) => ops.concat([bad])],
    ['concat of two', (bad) => ops.concat([t([1]), bad])],
    ['mean', (bad) => ops.mean(bad)],
    ['gatherRows', (bad) => ops.gatherRows(t([2, 2]), bad)],
    ['copyFrom', (bad) => t([2]).copyFrom(bad)],
    ['rmsNorm', (bad) => ops.rmsNorm(bad, undefined, 1e-5)],
    ['quantize', (bad) => ops.quantizeBlocks4(bad, 'nf4', 64)],
    ['quantize8', (bad) => functional.int8VectorwiseQuant(bad)],
    [
      'packed codes',
      (codes) =>
        ops.linear4bit(t([1, 2]), { codes, absmax: t([1]), quantType: 'nf4', blocksize: 64, n: 1, k: 2 }),
    ],
    ['Linear4bit', (bad) => new nn.Linear4bit(64, 2, { device: 'cpu' }).forward(bad)],
    ['Linear8bit', (bad) => new nn.Linear8bit(64, 2, { device: 'cpu' }).forward(bad)],
    ['Embedding', (bad) => new nn.Embedding(4, 2, { device: 'cpu' }).forward(bad)],
    ['LayerNorm', (bad) => new nn.LayerNorm(4, { device: 'cpu' }).forward(bad)],
    ['Linear', (bad) => new nn.Linear(2, 2, { device: 'cpu' }).forward(bad)],
  ]
  it.each(calls)('%s', (_, call) => {
    for (const bad of wrong) {
      const error = thrown(() => call(bad))
      expect(error.code).toBe('ERR_HALFBYTE_VALUE')
      expect(error.message).toContain('must be a Tensor')
    }
  })
})

describe('concat', () => {
  it.each([[2], [-3], [0.5], [NaN]])('has no dimension %d', (dim) => {
    expect(thrown(() => ops.concat([t([2, 3])], dim)).code).toBe('ERR_HALFBYTE_SHAPE')
  })
  it('has none at all for scalars', () => {
    expect(thrown(() => ops.concat([t([]), t([])])).message).toContain('has no dimension 0')
  })
  it('takes tensors of one number of dimensions', () => {
    expect(thrown(() => ops.concat([t([2, 3]), t([2])], 1)).code).toBe('ERR_HALFBYTE_SHAPE')
  })
})

describe('elements that expand() repeats', () => {
  it('are not written to', () => {
    const many = t([1, 3]).expand(4, 3)
    expect(thrown(() => many.copyFrom(t([4, 3]))).message).toContain('repeats elements')
    expect(thrown(() => ops.addInto(many, t([3]))).code).toBe('ERR_HALFBYTE_SHAPE')
  })
})

describe.each(devices())('parts of one tensor on %s', (on) => {
  // enough for several threads
  const n = 300_000
  const numbers = () =>
    Tensor.from(
      Float32Array.from({ length: n }, (_, i) => i % 1000),
      { device: on },
    )

  it.each([
    ['up', 1, 0],
    ['down', 0, 1],
  ])('are shifted %s', async (_, to, from) => {
    using t = numbers()
    const before = (await t.floats()).slice(from, n - 1 + from)
    using target = t.slice(0, to, n - 1 + to)
    using source = t.slice(0, from, n - 1 + from)
    target.copyFrom(source)
    expect((await t.floats()).subarray(to, n - 1 + to)).toEqual(before)
  })

  it('are added to one another as they were before', async () => {
    using t = Tensor.full([n], 1, 'float32', on)
    using target = t.slice(0, 1, n)
    using source = t.slice(0, 0, n - 1)
    ops.addInto(target, source)
    expect((await t.floats()).subarray(1).every((x) => x === 2)).toBe(true)
    ops.addInto(t, t)
    expect((await t.floats()).subarray(1).every((x) => x === 4)).toBe(true)
  })

  it('a square is transposed in place', async () => {
    using t = numbers()
    using square = t.slice(0, 0, 250_000).reshape(500, 500)
    const before = await square.floats()
    square.copyFrom(square.transpose(0, 1))
    const after = await square.floats()
    const at = (i: number) => before[(i % 500) * 500 + Math.floor(i / 500)]
    expect(after.every((x, i) => x === at(i))).toBe(true)
  })

  it('the halves of one are no reason for a copy', async () => {
    using t = numbers()
    const used = await baselineMemory(on)
    t.slice(0, 0, n / 2).copyFrom(t.slice(0, n / 2, n))
    await on.synchronize()
    expect(on.memoryUsage().peak).toBeLessThanOrEqual(used)
  })
})

describe.each(devices())('operands that are not contiguous on %s', (on) => {
  const strided = (x: Tensor) => x.to(on).transpose(0, 1).contiguous().transpose(0, 1)

  it('gatedActivation of one column', async () => {
    const both = t([4, 2]).to(on)
    const [gate, up] = [both.slice(1, 0, 1), both.slice(1, 1, 2)]
    const y = ops.gatedActivation(gate, up, 'relu')
    expect([...(await y.floats())]).toEqual([0, 2 * 3, 4 * 0, 1 * 2])
  })

  it('rope: tables and positions', async () => {
    const [x, cos, sin] = [t([3, 2, 4]).to(on), t([5, 2]).to(on), t([5, 2]).to(on)]
    const positions = t([3], 'int32').to(on)
    const expected = await ops.rope(x, cos, sin, positions).floats()
    expect(await ops.rope(x, strided(cos), strided(sin), positions).floats()).toEqual(expected)
  })

  it('sample: params', async () => {
    const rng = () => t([2, 2], 'int64').to(on)
    const params = Tensor.from([0.5, 0, 1, 0, 1, 0.5, 0, 1, 0, 1], { shape: [2, 5], device: on })
    const logits = t([2, 7]).to(on)
    const expected = await ops.sample(logits, { params, rng: rng() }).data()
    expect(await ops.sample(logits, { params: strided(params), rng: rng() }).data()).toEqual(expected)
    const error = thrown(() => ops.sample(logits, { params, rng: strided(rng()) }))
    expect(error.message).toContain('rng')
  })
})

it('a window of attention is a whole number', () => {
  const on = device('cpu')
  const [q, k] = [Tensor.zeros([2, 1, 4], 'float32', on), Tensor.zeros([2, 1, 4], 'float32', on)]
  for (const window of [-1, 0.5, NaN, '2' as unknown as number])
    expect(thrown(() => nn.packedAttention(q, k, k, { window })).code).toBe('ERR_HALFBYTE_SHAPE')
})
