import { devices, ops, Tensor, type DType } from '../../lib/index'
import { makeBatch } from '../support/attention'
import { noise } from '../support/reference'

const fround = Math.fround

/** 10000^(-2i / R) in fp32, as a model's configuration gives it. */
const frequencies = (rotated: number) =>
  Float32Array.from({ length: rotated / 2 }, (_, i) => fround(1 / 10000 ** ((2 * i) / rotated)))

describe.each(devices())('rope on %s', (device) => {
  it('makes tables from angles rounded to fp32', async () => {
    const invFreq = frequencies(64)
    for (const scale of [1, 1.25]) {
      const { cos, sin } = ops.ropeTables(Tensor.from(invFreq, { device }), 5000, scale)
      expect(cos.shape).toEqual([5000, 32])
      const [c, s] = [await cos.floats(), await sin.floats()]
      let worst = 0
      for (let p = 0; p < 5000; p++) {
        for (let i = 0; i < 32; i++) {
          const angle = fround(p * invFreq[i]!)
          worst = Math.max(worst, Math.abs(c[p * 32 + i]! - Math.cos(angle) * scale))
          worst = Math.max(worst, Math.abs(s[p * 32 + i]! - Math.sin(angle) * scale))
        }
      }
      expect(worst).toBeLessThan(1.5e-7)
    }
  })

  it('numbers the tokens of a ragged batch', async () => {
    const batch = makeBatch([2, 0, 3, 1], [2, 4, 10, 1], [[0], [0], [0], [0]], device)
    expect([...(await ops.raggedPositions(batch, 6).data())]).toEqual([0, 1, 7, 8, 9, 0])
    // tokens that belong to no sequence have no position
    expect([...(await ops.raggedPositions(batch, 8).data())]).toEqual([0, 1, 7, 8, 9, 0, -1, -1])
  })

  const shapes: [number, number, number, number][] = [
    // tokens, heads, head size, rotated
    [5, 3, 64, 64],
    [1, 2, 128, 128],
    [300, 4, 32, 32],
    [7, 2, 80, 32],
    [3, 1, 11, 6],
    [4, 2, 2, 2],
    [4, 2, 8, 0],
    [0, 2, 8, 8],
  ]
  const bounds: [DType, number][] = [
    ['float32', 3e-7],
    ['float16', 2e-3],
    ['bfloat16', 1.2e-2],
  ]
  describe.each(bounds)('%s', (dtype, bound) => {
    it.each(shapes)('%d tokens, %d heads of %d, %d of them rotated', async (tokens, heads, dim, rotated) => {
      const half = rotated / 2
      const { cos, sin } = ops.ropeTables(Tensor.from(frequencies(rotated), { device }), 1000)
      const [c, s] = [await cos.floats(), await sin.floats()]
      const positions = Int32Array.from({ length: tokens }, (_, t) => (t * 37) % 1000)
      const x = Tensor.from(noise(tokens * heads * dim, 3), { shape: [tokens, heads, dim], device }).to(dtype)
      const source = await x.floats()
      for (const interleaved of [false, true]) {
        const y = await ops.rope(x, cos, sin, Tensor.from(positions, { device }), interleaved).floats()
        const expected = Float64Array.from(source)
        for (let t = 0; t < tokens; t++) {
          for (let h = 0; h < heads; h++) {
            for (let i = 0; i < half; i++) {
              const at = (t * heads + h) * dim
              const first = at + (interleaved ? 2 * i : i)
              const second = at + (interleaved ? 2 * i + 1 : i + half)
              const [cosine, sine] = [c[positions[t]! * half + i]!, s[positions[t]! * half + i]!]
              expected[first] = source[first]! * cosine - source[second]! * sine
              expected[second] = source[second]! * cosine + source[first]! * sine
            }
          }
        }
        let [rotatedError, copiedError] = [0, 0]
        for (let i = 0; i < y.length; i++) {
          const error = Math.abs(y[i]! - expected[i]!)
          if (i % dim < rotated) rotatedError = Math.max(rotatedError, error)
          else copiedError = Math.max(copiedError, error)
        }
        expect(rotatedError).toBeLessThanOrEqual(bound)
        expect(copiedError).toBe(0)
      }
    })
  })

  it('takes heads out of wider rows', async () => {
    const { cos, sin } = ops.ropeTables(Tensor.from(frequencies(8), { device }), 10)
    const wide = Tensor.from(noise(4 * 5 * 8, 9), { shape: [4, 5, 8], device })
    const positions = Tensor.from(Int32Array.from([0, 3, 9, 1]), { device })
    const part = wide.slice(1, 1, 3)
    const y = await ops.rope(part, cos, sin, positions).data()
    expect(y).toEqual(await ops.rope(part.contiguous(), cos, sin, positions).data())
  })

  it('gives NaN for a position that the tables do not have', async () => {
    const { cos, sin } = ops.ropeTables(Tensor.from(frequencies(4), { device }), 10)
    const x = Tensor.full([3, 1, 6], 1, 'float32', device)
    const positions = Tensor.from(Int32Array.from([10, -1, 9]), { device })
    const y = await ops.rope(x, cos, sin, positions).data()
    expect([...y].map(Number).map(Number.isNaN)).toEqual(
      Array.from({ length: 18 }, (_, i) => i < 12 && i % 6 < 4),
    )
    expect(y[4]).toBe(1)
  })

  it('refuses what does not fit', () => {
    const { cos, sin } = ops.ropeTables(Tensor.from(frequencies(8), { device }), 10)
    const positions = Tensor.from(Int32Array.from([0]), { device })
    const x = Tensor.zeros([1, 1, 6], 'float32', device)
    expect(() => ops.rope(x, cos, sin, positions)).toThrow(/8 rotated elements, heads of 6/)
    const ids = Tensor.zeros([1, 1, 8], 'int32', device)
    expect(() => ops.rope(ids, cos, sin, positions)).toThrow(/int32/)
  })
})
