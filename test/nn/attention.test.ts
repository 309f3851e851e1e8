import { devices, packedAttention, SelfAttention, Tensor } from '../../lib/index.js'
import { expectClose, noise } from '../support/reference.js'

describe.each(devices())('attention on %s', (device) => {
  const [heads, shared, dim] = [4, 2, 6]

  /** The definition, in double. */
  function attention(
    q: Float32Array,
    k: Float32Array,
    v: Float32Array,
    lengths: number[],
    causal: boolean,
  ): number[] {
    const y: number[] = []
    let start = 0
    for (const length of lengths) {
      for (let i = 0; i < length; i++) {
        for (let h = 0; h < heads; h++) {
          const kv = Math.floor(h / (heads / shared))
          const at = (x: Float32Array, row: number, n: number, head: number) =>
            x.subarray(((start + row) * n + head) * dim, ((start + row) * n + head + 1) * dim)
          const last = causal ? i + 1 : length
          const scores = Array.from({ length: last }, (_, j) => {
            const [a, b] = [at(q, i, heads, h), at(k, j, shared, kv)]
            return Math.exp(a.reduce((s, x, d) => s + x * b[d]!, 0) / Math.sqrt(dim))
          })
          const sum = scores.reduce((a, b) => a + b, 0)
          for (let d = 0; d < dim; d++) {
            y.push(scores.reduce((s, p, j) => s + (p / sum) * at(v, j, shared, kv)[d]!, 0))
          }
        }
      }
      start += length
    }
    return y
  }

  it.each([[[1]], [[7]], [[5, 5, 5]], [[4, 6]], [[1, 7, 3]]])(
    'of packed sequences of %p tokens',
    async (lengths) => {
      const tokens = lengths.reduce((a, b) => a + b, 0)
      const q = noise(tokens * heads * dim, 1)
      const [k, v] = [noise(tokens * shared * dim, 2), noise(tokens * shared * dim, 3)]
      const tensor = (x: Float32Array, n: number) => Tensor.from(x, { shape: [tokens, n, dim], device })
      for (const causal of [true, false]) {
        const y = packedAttention(tensor(q, heads), tensor(k, shared), tensor(v, shared), { lengths, causal })
        expectClose(await y.floats(), attention(q, k, v, lengths, causal))
      }
    },
  )

  it('refuses lengths that do not add up', () => {
    const t = Tensor.zeros([4, 2, 6], 'float32', device)
    expect(() => packedAttention(t, t, t, { lengths: [3] })).toThrow(/4 rows/)
    expect(() => packedAttention(t, t, t, { lengths: [4, 0] })).toThrow(/must be positive/)
    expect(packedAttention(t.slice(0, 0, 0), t.slice(0, 0, 0), t.slice(0, 0, 0)).shape).toEqual([0, 2, 6])
    expect(() => new SelfAttention(10, 3)).toThrow(/do not divide/)
  })

  it('SelfAttention sees no later token and no other sequence', async () => {
    const layer = new SelfAttention(32, 4, { numKeyValueHeads: 2, ropeTheta: 10000, device })
    const x = noise(7 * 32, 5)
    const whole = await layer.forward(Tensor.from(x, { shape: [7, 32], device })).floats()
    const first = await layer.forward(Tensor.from(x.slice(0, 4 * 32), { shape: [4, 32], device })).floats()
    const rest = await layer.forward(Tensor.from(x.slice(4 * 32), { shape: [3, 32], device })).floats()
    const packed = await layer.forward(Tensor.from(x, { shape: [7, 32], device }), [4, 3]).floats()
    expectClose(whole.subarray(0, 4 * 32), first)
    expectClose(packed, [...first, ...rest])
    const difference = Math.max(...rest.map((value, i) => Math.abs(value - whole[4 * 32 + i]!)))
    expect(difference).toBeGreaterThan(1e-3)
  })

  it('depends on positions only through their distance with rotary embeddings', async () => {
    const plain = new SelfAttention(32, 4, { device })
    const rotary = new SelfAttention(32, 4, { ropeTheta: 100, device })
    await rotary.loadStateDict(await plain.stateDict())
    const row = noise(32, 8)
    const x = Tensor.from(
      Float32Array.from({ length: 96 }, (_, i) => row[i % 32]! * (i < 32 ? 1 : 2)),
      {
        shape: [3, 32],
        device,
      },
    )
    const [a, b] = [await plain.forward(x).floats(), await rotary.forward(x).floats()]
    expectClose(a.subarray(0, 32), b.subarray(0, 32))
    expect(Math.max(...a.map((value, i) => Math.abs(value - b[i]!)))).toBeGreaterThan(1e-4)
  })
})
