/** Gradients: against finite differences, and what they accumulate to. */
import { devices, isGradEnabled, noGrad, ops, Tensor, type Device } from '../../lib/index'
import { thrown } from '../support/errors'
import { drawn } from '../support/drawn'
import { relativeError } from '../support/reference'

const { add, concat, div, linear, linear4bit, linear8bit, mean, mul, sub } = ops

describe.each(devices())('gradients on %s', (on: Device) => {
  const { random, leaf } = drawn(on)
  const sumOf = (a: ArrayLike<number>, b: ArrayLike<number>) =>
    Array.from(a).reduce((s, v, i) => s + v * b[i]!, 0)

  /** d <y, weights> along a direction, by the gradients of all inputs and by a step to either side. */
  async function check(inputs: Tensor[], fn: (...inputs: Tensor[]) => Tensor, step = 0.25, limit = 2e-4) {
    const y = fn(...inputs)
    const weights = random(...y.shape)
    y.backward(weights)
    const directions = inputs.map((x) => random(...x.shape))
    let found = 0
    for (const [i, x] of inputs.entries()) {
      expect(x.grad!.shape).toEqual(x.shape)
      expect(x.grad!.dtype).toBe(x.dtype)
      expect(x.grad!.requiresGrad).toBe(false)
      found += sumOf(await x.grad!.floats(), await directions[i]!.floats())
    }
    const at = async (t: number) => {
      const moved = noGrad(() => fn(...inputs.map((x, i) => add(x, mul(directions[i]!, t)))))
      return sumOf(await moved.floats(), await weights.floats())
    }
    const wanted = ((await at(step)) - (await at(-step))) / (2 * step)
    const scale = Math.hypot(...(await weights.floats())) + Math.abs(wanted)
    expect(Math.abs(found - wanted) / scale).toBeLessThan(limit)
  }

  describe('agree with finite differences', () => {
    it.each<[string, number[][], (...x: Tensor[]) => Tensor]>([
      [
        'add',
        [
          [3, 4],
          [3, 4],
        ],
        (a, b) => add(a, b),
      ],
      [
        'add, both repeated',
        [
          [3, 1, 5],
          [4, 1],
        ],
        (a, b) => add(a, b),
      ],
      ['sub of a row', [[6, 5], [5]], (a, b) => sub(a, b)],
      ['sub from a scalar', [[], [2, 3]], (a, b) => sub(a, b)],
      [
        'mul',
        [
          [3, 4],
          [3, 4],
        ],
        (a, b) => mul(a, b),
      ],
      [
        'mul by a column',
        [
          [3, 4],
          [3, 1],
        ],
        (a, b) => mul(a, b),
      ],
      ['mul by itself', [[7]], (a) => mul(a, a)],
      ['mul by a number', [[2, 3]], (a) => mul(a, 3)],
      ['reshape', [[2, 6]], (a) => mul(a.reshape(3, -1), a.reshape(3, 4))],
      ['reshape of what is strided', [[2, 6]], (a) => a.transpose(0, 1).reshape(4, 3)],
      ['slice', [[5, 4]], (a) => add(a.slice(0, 1, 3), a.slice(0, 2, 4))],
      ['slice of the last dimension', [[2, 3, 4]], (a) => a.slice(-1, 1, 3)],
      ['permute', [[2, 3, 4]], (a) => a.permute(2, 0, 1)],
      ['expand', [[3, 1]], (a) => mul(a.expand(2, 3, 4), 2)],
      ['share and clone', [[3]], (a) => add(a.share(), a.clone())],
      ['a copy of what is strided', [[3, 2]], (a) => a.transpose(0, 1).contiguous()],
      [
        'concat',
        [
          [2, 3],
          [2, 1],
        ],
        (a, b) => concat([a, b, a], 1),
      ],
      ['mean', [[4, 5]], (a) => mean(mul(a, a))],
      ['mean of a scalar', [[]], (a) => mean(a)],
      [
        'linear',
        [
          [3, 8],
          [5, 8],
        ],
        (x, w) => linear(x, w),
      ],
      ['linear of one row', [[8], [5, 8]], (x, w) => linear(x, w)],
      [
        'linear with bias and residual',
        [[2, 3, 8], [5, 8], [5], [2, 3, 5]],
        (x, w, bias, residual) => linear(x, w, { bias, residual }),
      ],
      [
        'linear of strided operands',
        [
          [8, 3],
          [8, 5],
        ],
        (x, w) => linear(x.transpose(0, 1), w.transpose(0, 1)),
      ],
    ])('%s', async (_, shapes, fn) => {
      await check(
        shapes.map((shape) => leaf(...shape)),
        fn,
      )
    })

    it('div', async () => {
      const bottom = noGrad(() => add(mul(random(4), random(4)), 6))
      bottom.requiresGrad = true
      await check([leaf(3, 4), bottom], (a, b) => div(a, b), 0.02, 1e-3)
    })

    it('div in 16 bits, where products would leave the range', async () => {
      for (const [top, bottom, dy] of [
        [1000, 300, 1],
        [300, 200, 1024],
        [0.001, 0.0002, 1],
      ] as const) {
        const half = (value: number) => Tensor.from([value], { dtype: 'float16', device: on })
        const b = half(bottom)
        b.requiresGrad = true
        div(half(top), b).backward(half(dy))
        expect((await b.grad!.item()) / ((-dy * top) / bottom ** 2)).toBeCloseTo(1, 1)
      }
    })

    it('a chain of everything', async () => {
      await check(
        [leaf(3, 6), leaf(4, 6), leaf(4)],
        (x, w, b) => {
          const y = linear(x, w, { bias: b })
          const z = add(mul(y, 0.5), y.slice(0, 0, 1))
          return concat([z, linear(z.reshape(4, 3).transpose(0, 1), w.slice(1, 0, 4))], 1)
        },
        0.02,
        1e-3,
      )
    })
  })

  describe('of quantised products', () => {
    const [n, k] = [32, 64]

    it.each([true, false])('in 4 bits, statistics quantised too: %s', async (compress) => {
      const { codes, state } = (await import('../../lib/index.js')).functional.quantize4bit(random(n, k), {
        quantType: 'nf4',
        compressStatistics: compress,
      })
      const packed = {
        codes,
        absmax: state.absmax,
        nestedAbsmax: state.state2?.absmax,
        nestedCode: state.state2?.code,
        offset: state.offset,
        quantType: 'nf4' as const,
        blocksize: 64,
        n,
        k,
      }
      await check([leaf(5, k), leaf(n), leaf(5, n)], (x, bias, residual) =>
        linear4bit(x, packed, { bias, residual }),
      )
    })

    it('in int8, as if what is quantised were not rounded', async () => {
      const [x, w, bias] = [leaf(5, k), leaf(n, k), leaf(n)]
      const { codes, rowAbsmax } = noGrad(() => ops.int8QuantizeRows(w))
      const y = linear8bit(x, codes, rowAbsmax, { bias, threshold: 2, source: w })
      const dy = random(5, n)
      y.backward(dy)
      const values = ops.int8DequantizeRows(codes, rowAbsmax, 'float32')
      const product = async (a: Tensor, b: Tensor) => noGrad(() => linear(a, b)).floats()
      expect(relativeError(await x.grad!.floats(), await product(dy, values.transpose(0, 1)))).toBeLessThan(
        1e-6,
      )
      const wanted = await product(
        dy.transpose(0, 1),
        noGrad(() => x.transpose(0, 1)),
      )
      expect(relativeError(await w.grad!.floats(), wanted)).toBeLessThan(1e-6)
      const ones = Tensor.full([1, 5], 1, 'float32', on)
      expect(relativeError(await bias.grad!.floats(), await product(ones, dy.transpose(0, 1)))).toBeLessThan(
        1e-6,
      )
    })
  })

  it('have the dtype of the tensor, through casts', async () => {
    const x = random(3, 4).to('bfloat16')
    const bias = random(6)
    x.requiresGrad = bias.requiresGrad = true
    const w = random(6, 4).to('bfloat16')
    const y = linear(x, w, { bias }).to('float32')
    expect(y.requiresGrad).toBe(true)
    mean(y).backward()
    expect([x.grad!.dtype, bias.grad!.dtype]).toEqual(['bfloat16', 'float32'])
    for (const value of await bias.grad!.floats()) expect(value).toBeCloseTo(3 / 18, 2)
    expect(y.to('int32').requiresGrad).toBe(false)
  })

  it('add up until they are freed', async () => {
    const x = leaf(3)
    for (const times of [1, 2, 3]) {
      mul(x, 2).backward(Tensor.full([3], 1, 'float32', on))
      expect(await x.grad!.data()).toEqual(new Float32Array(3).fill(2 * times))
    }
    const y = mul(x, x)
    const ones = Tensor.full([3], 1, 'float32', on)
    x.zeroGrad()
    expect(x.grad).toBeUndefined()
    y.backward(ones, { retainGraph: true })
    const once = await x.grad!.floats()
    y.backward(ones)
    expect(await x.grad!.floats()).toEqual(once.map((v) => 2 * v))
    const error = thrown(() => y.backward(ones))
    expect(error.code).toBe('ERR_HALFBYTE_USAGE')
    expect(error.message).toMatch(/mul had saved was freed .* retainGraph/)
  })

  it('are memory of their own', async () => {
    const [x, y] = [leaf(2), leaf(2)]
    const dy = Tensor.from([1, 2], { device: on })
    add(x, y.reshape(2)).backward(dy)
    expect(new Set([x.grad, y.grad, dy].map((t) => t!.storageId)).size).toBe(3)
    x.zeroGrad()
    x.backward(dy)
    expect(await x.grad!.data()).toEqual(await dy.data())
    expect(x.grad!.storageId).not.toBe(dy.storageId)
  })

  it('are summed in float32, long sums by runs', async () => {
    const rows = 2 ** 17 + 5
    const bias = leaf(2)
    add(Tensor.zeros([rows, 2], 'float32', on), bias).backward(Tensor.full([rows, 2], 0.1, 'float32', on))
    for (const sum of await bias.grad!.floats()) expect(sum / (rows * 0.1)).toBeCloseTo(1, 5)
    const w = leaf(1, 1)
    const many = (value: number) => Tensor.full([300, 1], value, 'float16', on)
    linear(many(200), w).backward(many(2))
    expect(await w.grad!.item()).toBe(120_000)
  })

  it('of nothing are nothing', async () => {
    const [x, none] = [leaf(3, 2), leaf(0, 2)]
    linear(x, none).backward(Tensor.zeros([3, 0], 'float32', on))
    expect(await x.grad!.data()).toEqual(new Float32Array(6))
    expect(none.grad!.shape).toEqual([0, 2])
    const [empty, w, bias] = [leaf(3, 0), leaf(2, 0), leaf(2)]
    linear(empty, w, { bias }).backward(Tensor.full([3, 2], 1, 'float32', on))
    expect([empty.grad!.shape, w.grad!.shape]).toEqual([
      [3, 0],
      [2, 0],
    ])
    expect(await bias.grad!.data()).toEqual(Float32Array.of(3, 3))
  })

  it('of many parts of a tensor are one', async () => {
    const x = leaf(300, 4)
    let sum = x.slice(0, 0, 1)
    for (let i = 1; i < 300; i++) sum = add(sum, mul(x.slice(0, i, i + 1), i))
    const more = mul(x.slice(1, 1, 3), 2)
    concat([sum.reshape(-1), more.reshape(-1)]).backward(Tensor.full([604], 1, 'float32', on))
    const found = await x.grad!.floats()
    const factor = (i: number) => (i === 0 ? 1 : i)
    expect(found).toEqual(
      Float32Array.from({ length: 1200 }, (_, i) => factor(i >> 2) + ((i + 3) % 4 < 2 ? 2 : 0)),
    )
    const before = x.grad
    x.slice(0, 0, 1).backward(Tensor.full([1, 4], 1, 'float32', on))
    expect(before!.disposed).toBe(true)
    expect((await x.grad!.data()).slice(0, 4)).toEqual(found.slice(0, 4).map((v) => v + 1))
  })

  it('reach a tensor on every way that there is, each op once', async () => {
    let y = leaf(1)
    const x = y
    for (let i = 0; i < 40; i++) y = add(y, y) // 2^40 ways
    y.backward()
    expect(await x.grad!.item()).toBe(2 ** 40)
  })

  it('go only where they are wanted', async () => {
    const [x, w] = [leaf(2, 4), leaf(3, 4)]
    expect(noGrad(() => linear(x, w)).requiresGrad).toBe(false)
    expect(isGradEnabled()).toBe(true)
    expect(() => noGrad(() => Promise.resolve())).toThrow(/synchronous/)
    linear(x.detach(), w).backward(random(2, 3))
    expect(x.grad).toBeUndefined()
    expect(w.grad).toBeDefined()
    x.requiresGrad = false
    w.requiresGrad = false
    expect(linear(x, w).requiresGrad).toBe(false)
    // what has no gradient is of no matter where none is wanted
    ops.activation(x, 'silu').dispose()
    // integers have none
    const z = leaf(4)
    expect(await ops.countNonfinite(z).item()).toBe(0)
  })
})
