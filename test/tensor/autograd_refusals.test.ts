/** Gradients: what is refused, and that nothing is left behind. */
import { devices, noGrad, ops, Tensor, tidy, type Device } from '../../lib/index'
import { drawn } from '../support/drawn'
import { thrown } from '../support/errors'
import { allocatedMemory, baselineMemory } from '../support/memory'

const { add, addInto, linear, linear4bit, linear8bit, mean, mul, sub } = ops

describe.each(devices())('gradients on %s', (on: Device) => {
  const { random, leaf } = drawn(on)

  describe('are refused', () => {
    it.each<[string, (x: Tensor) => unknown, string, RegExp]>([
      [
        'an op that has none',
        (x) => ops.activation(x, 'silu'),
        'UNSUPPORTED',
        /activation: has no gradient, and Tensor\(float32 \[2, 3\]/,
      ],
      [
        'a norm',
        (x) => ops.rmsNorm(x, Tensor.full([3], 1, 'float32', x.device), 1e-6),
        'UNSUPPORTED',
        /rms_norm.*noGrad/,
      ],
      ['minimum', (x) => ops.minimum(x, 1), 'UNSUPPORTED', /binary: has no gradient/],
      ['bitcast', (x) => x.bitcast('int32'), 'UNSUPPORTED', /bitcast/],
      ['writing to a leaf', (x) => x.write(new Float32Array(6)), 'USAGE', /write: would write over .*noGrad/],
      ['adding into a leaf', (x) => addInto(x, x), 'USAGE', /would write over/],
      ['copying into a leaf', (x) => x.copyFrom(x.detach()), 'USAGE', /would write over/],
      ['many elements alone', (x) => mul(x, 2).backward(), 'SHAPE', /has 6 elements; give the gradient/],
      [
        'a gradient of another shape',
        (x) => mul(x, 2).backward(Tensor.zeros([3], 'float32', x.device)),
        'SHAPE',
        /the gradient is Tensor\(float32 \[3\] .*, not one of .*\[2, 3\]/,
      ],
      [
        'a gradient of another dtype',
        (x) => mul(x, 2).backward(Tensor.zeros([2, 3], 'float16', x.device)),
        'SHAPE',
        /float16/,
      ],
      [
        'a result that needs none',
        (x) => mul(x.detach(), 2).backward(),
        'USAGE',
        /was not computed from a tensor that requires/,
      ],
      [
        'turning it off on a result',
        (x) => void (mul(x, 2).requiresGrad = false),
        'USAGE',
        /is the result of mul; detach\(\)/,
      ],
      ['integers', (x) => void (x.detach().to('int32').requiresGrad = true), 'DTYPE', /not of a float dtype/],
    ])('for %s', (_, fn, code, message) => {
      const x = leaf(2, 3)
      const error = thrown(() => fn(x))
      expect(error.code).toBe(`ERR_HALFBYTE_${code}`)
      expect(error.message).toMatch(message)
    })

    it('when what they need was written to since', () => {
      const [x, w] = [leaf(2, 4), random(3, 4)]
      const y = linear(x, w)
      w.slice(0, 0, 1).copyFrom(random(1, 4))
      const error = thrown(() => y.backward(random(2, 3)))
      expect(error.code).toBe('ERR_HALFBYTE_USAGE')
      expect(error.message).toMatch(/\[3, 4\].*gradient of linear is made from, was written to since/)
      // a step of learning lies between two passes
      const v = leaf(3, 4)
      for (let i = 0; i < 2; i++) {
        linear(x, v).backward(random(2, 3))
        noGrad(() => v.copyFrom(sub(v, v.grad!)))
      }
    })

    it.each<[string, (w: Tensor, graph: () => void) => unknown]>([
      ['by a graph that is replayed', (_, replay) => replay()],
      ['through a view', (w) => w.reshape(12).write(new Float32Array(12))],
    ])('when what they need was written to %s', async (_, write) => {
      const [x, w, other] = [leaf(2, 4), random(3, 4), random(3, 4)]
      using graph = on.capture(() => w.copyFrom(other))
      const y = linear(x, w)
      write(w, () => graph.replay())
      expect(thrown(() => y.backward(random(2, 3))).message).toMatch(/was written to since/)
      expect(x.grad).toBeUndefined()
      // what a graph allocates itself is its own
      const z = linear(x, w)
      using own = on.capture(() => add(other, 1).dispose())
      own.replay()
      z.backward(random(2, 3))
      await on.synchronize()
    })

    it('not when a write was refused', () => {
      const [x, w] = [leaf(2, 4), random(3, 4)]
      const y = linear(x, w)
      expect(thrown(() => w.copyFrom(random(2, 4))).code).toBe('ERR_HALFBYTE_SHAPE')
      expect(thrown(() => w.copyFrom(Tensor.zeros([3, 4], 'float32', 'cpu:1'))).code).toBe(
        'ERR_HALFBYTE_DEVICE',
      )
      y.backward(random(2, 3))
    })

    it('for statistics of a quantised weight, also where x requires one', () => {
      const codes = Tensor.zeros([64, 1], 'uint8', on)
      const packed = { codes, absmax: leaf(2), quantType: 'nf4' as const, blocksize: 64, n: 2, k: 64 }
      for (const x of [random(1, 64), leaf(1, 64)]) {
        expect(thrown(() => linear4bit(x, packed)).code).toBe('ERR_HALFBYTE_UNSUPPORTED')
      }
      const [weight, scb] = [Tensor.zeros([2, 64], 'int8', on), leaf(2)]
      expect(thrown(() => linear8bit(leaf(1, 64), weight, scb)).code).toBe('ERR_HALFBYTE_UNSUPPORTED')
    })

    it('of disposed tensors', () => {
      const x = leaf(3)
      const y = mean(x)
      y.dispose()
      expect(thrown(() => y.backward()).code).toBe('ERR_HALFBYTE_DISPOSED')
      const z = mean(mul(x, 2))
      x.dispose()
      const error = thrown(() => z.backward())
      expect(error.code).toBe('ERR_HALFBYTE_DISPOSED')
      expect(error.message).toMatch(/requires a gradient, was disposed; dispose it after backward/)
    })

    it('that are assigned and do not fit, and what was assigned is kept', async () => {
      const x = leaf(2)
      for (const wrong of [random(3), random(2).to('float16')]) {
        expect(thrown(() => (x.grad = wrong)).code).toBe('ERR_HALFBYTE_SHAPE')
      }
      tidy(() => {
        mul(x, 3).backward(Tensor.full([2], 1, 'float32', on))
        x.grad = mul(x.grad!, 0.5)
      })
      expect(await x.grad!.data()).toEqual(new Float32Array(2).fill(1.5))
      x.grad!.dispose()
      expect(x.grad).toBeUndefined()
      mul(x, 3).backward(Tensor.full([2], 1, 'float32', on))
      expect(await x.grad!.data()).toEqual(new Float32Array(2).fill(3))
      const options = { retainGraph: true } as unknown as Tensor
      expect(thrown(() => mean(x).backward(options)).message).toMatch(/the gradient is object, not one of/)
      expect(thrown(() => (x.requiresGrad = 1 as unknown as boolean)).code).toBe('ERR_HALFBYTE_VALUE')
    })
  })

  describe('leave nothing behind', () => {
    const turn = (use: (loss: Tensor, x: Tensor) => void) => {
      const [x, w] = [leaf(64, 32), leaf(16, 32)]
      tidy(() => {
        const loss = tidy(() => {
          const y = mul(linear(x, w), 0.5)
          return mean(mul(sub(y, 1), sub(y, 1)))
        })
        use(loss, x)
      })
      x.dispose()
      w.dispose()
    }

    it('after backward() that is refused half-way', async () => {
      const x = leaf(1000)
      const y = mul(x, x)
      y.backward(Tensor.full([1000], 1, 'float32', on))
      const before = await baselineMemory(on)
      for (let i = 0; i < 5; i++) {
        using dy = Tensor.full([1000], 1, 'float32', on)
        expect(thrown(() => y.backward(dy)).code).toBe('ERR_HALFBYTE_USAGE')
      }
      expect(await allocatedMemory(on)).toBeLessThanOrEqual(before)
    })

    it.each<[string, (loss: Tensor) => void]>([
      ['backward()', (loss) => loss.backward()],
      ['backward() that keeps the graph', (loss) => loss.backward(undefined, { retainGraph: true })],
      ['no backward()', () => {}],
      [
        'a backward() that fails',
        (loss) => void thrown(() => loss.backward(Tensor.zeros([2], 'float32', on))),
      ],
    ])('after %s', async (_, use) => {
      tidy(() => turn(use))
      const before = await baselineMemory(on)
      for (let i = 0; i < 5; i++) tidy(() => turn(use))
      expect(await allocatedMemory(on)).toBeLessThanOrEqual(before)
    })

    it('free what a node keeps as soon as its result is disposed', async () => {
      const [x, w] = [leaf(512, 256), random(256, 256)]
      const before = await baselineMemory(on)
      const y = mul(linear(x, w), linear(x, w))
      expect(await allocatedMemory(on)).toBeGreaterThanOrEqual(before + 3 * 512 * 256 * 4)
      y.dispose()
      // the two products were never disposed by name: they live until they are collected
      expect(await baselineMemory(on)).toBeLessThanOrEqual(before)
      for (const t of [x, w]) t.dispose()
    })
  })
})
