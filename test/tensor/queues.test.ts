/** Order between the queues and devices, failures on their way through the queues, captured graphs. */
import { device, devices, ops, Tensor } from '../../lib/index'
import { native } from '../../lib/native'
import { rejection, thrown } from '../support/errors'
import { allocatedMemory, baselineMemory } from '../support/memory'

const count = (n: number) => Float32Array.from({ length: n }, (_, i) => i)

/** An op that the backend refuses when it runs: its output carries the failure. */
function broken(x: Tensor): Tensor {
  const y = Tensor.empty(x.shape, x.dtype, x.device)
  x.device.native.run(native.ops.indexOf('binary'), [y.handle], [x.handle, x.handle], [99])
  return y
}

describe.each(devices())('queues of %s', (on) => {
  const other = on.name === 'cpu' ? 'cpu:1' : 'cpu'

  it('keep the order of a long chain', async () => {
    using one = Tensor.full([64], 1, 'float32', on)
    let x = Tensor.zeros([64], 'float32', on)
    for (let i = 0; i < 2000; i++) {
      const next = ops.add(x, one)
      x.dispose()
      x = next
    }
    expect(await x.data()).toEqual(new Float32Array(64).fill(2000))
    x.dispose()
  })

  it('order ops and copies between devices, both ways', async () => {
    const n = 50_000
    let x = Tensor.from(new Float32Array(n), { device: on })
    for (let i = 0; i < 30; i++) {
      const here = ops.add(x, 1)
      const there = here.to(other)
      // written again while the copy may still be reading
      here.write(new Float32Array(n).fill(-1))
      const sum = ops.add(there, 1)
      const back = sum.to(on)
      for (const t of [x, here, there, sum]) t.dispose()
      x = back
    }
    const data = await x.data()
    x.dispose()
    expect(data.every((v) => v === 60)).toBe(true)
  })

  it('move strided tensors and dtypes', async () => {
    using x = Tensor.from(count(6), { shape: [2, 3], device: on })
    using turned = x.transpose(0, 1)
    using moved = turned.to({ device: other, dtype: 'int32' })
    expect(moved.device.name).toBe(other)
    expect(moved.shape).toEqual([3, 2])
    expect(await moved.data()).toEqual(Int32Array.of(0, 3, 1, 4, 2, 5))
  })

  it('answer reads and synchronize() in any order of asking', async () => {
    using x = Tensor.from(count(100_000), { device: on })
    const results: string[] = []
    using y = ops.activation(x, 'tanh')
    const reading = y.data().then(() => results.push('read'))
    const waiting = on.synchronize().then(() => results.push('synchronize'))
    await Promise.all([reading, waiting])
    expect(results.sort()).toEqual(['read', 'synchronize'])
    await Promise.all([on.synchronize(), on.synchronize()])
  })

  describe('failures', () => {
    it('reach whoever reads, with code and the name of the op', async () => {
      using x = Tensor.from(count(4), { device: on })
      using y = broken(x)
      const error = await rejection(y.data())
      expect(error.code).toBe('ERR_HALFBYTE_VALUE')
      expect(error.message).toMatch(/^binary: operation 99/)
    })

    it('spoil what depends on them and nothing else', async () => {
      using x = Tensor.from(count(4), { device: on })
      using bad = broken(x)
      using worse = ops.add(bad, x)
      using moved = worse.to(other)
      using back = moved.to(on)
      using good = ops.add(x, x)
      expect((await rejection(back.data())).message).toMatch(/^binary: operation 99/)
      expect((await rejection(back.floats())).code).toBe('ERR_HALFBYTE_VALUE')
      expect(await good.data()).toEqual(Float32Array.of(0, 2, 4, 6))
      await on.synchronize()
    })

    it('end when all of the tensor is written anew, not when a part is', async () => {
      using x = Tensor.from(count(4), { device: on })
      using bad = broken(x)
      using half = bad.slice(0, 0, 2)
      half.write(count(2))
      expect((await rejection(bad.data())).code).toBe('ERR_HALFBYTE_VALUE')
      bad.write(count(4))
      expect(await bad.data()).toEqual(count(4))
      using again = broken(x)
      ops.copyInto(again, x)
      expect(await again.data()).toEqual(count(4))
    })

    it('are no different for memory that is not to be had', async () => {
      using huge = Tensor.empty([2 ** 49], 'uint8', on)
      ops.fillInto(huge, 1)
      using part = huge.slice(0, 0, 4)
      const error = await rejection(part.data())
      expect(error.code).toBe('ERR_HALFBYTE_OUT_OF_MEMORY')
      expect(error.message).toContain('562949953421312')
      using fine = Tensor.full([2], 1, 'float32', on)
      expect(await fine.data()).toEqual(Float32Array.of(1, 1))
    })
  })

  describe('graphs', () => {
    it('record without running, and replay on what is in the tensors then', async () => {
      using x = Tensor.from(count(4), { device: on })
      using probe = Tensor.zeros([4], 'float32', on)
      let y!: Tensor
      using graph = on.capture(() => {
        const a = ops.mul(x, 3)
        const b = ops.add(a, x)
        y = ops.activation(b, 'relu')
        ops.copyInto(probe, y)
        a.dispose()
        b.dispose()
      })
      expect(await probe.data()).toEqual(new Float32Array(4))
      graph.replay()
      expect(await y.data()).toEqual(Float32Array.of(0, 4, 8, 12))
      expect(await probe.data()).toEqual(Float32Array.of(0, 4, 8, 12))
      for (let i = 1; i <= 5; i++) {
        x.write(Float32Array.of(i, -i, 0, 2 * i))
        graph.replay()
        using direct = ops.activation(ops.add(ops.mul(x, 3), x), 'relu')
        expect(await y.data()).toEqual(await direct.data())
      }
      y.dispose()
    })

    it('carry a state from replay to replay', async () => {
      using state = Tensor.zeros([1], 'float32', on)
      using one = Tensor.full([1], 1, 'float32', on)
      using graph = on.capture(() => ops.addInto(state, one))
      for (let i = 0; i < 100; i++) graph.replay()
      expect(await state.item()).toBe(100)
    })

    it('order with copies to other devices', async () => {
      using state = Tensor.zeros([10_000], 'float32', on)
      using one = Tensor.full([10_000], 1, 'float32', on)
      using graph = on.capture(() => ops.addInto(state, one))
      const copies: Tensor[] = []
      for (let i = 0; i < 20; i++) {
        graph.replay()
        copies.push(state.to(other))
      }
      for (const [i, copy] of copies.entries()) {
        expect((await copy.data())[9_999]).toBe(i + 1)
        copy.dispose()
      }
    })

    it('keep their memory until they are disposed', async () => {
      const before = await baselineMemory(on)
      using x = Tensor.zeros([1_000_000], 'float32', on)
      const graph = on.capture(() => ops.add(x, x).dispose())
      graph.replay()
      // garbage of earlier tests may go meanwhile: it is small
      expect(await allocatedMemory(on)).toBeGreaterThan(before + 7_000_000)
      graph.dispose()
      graph.dispose()
      x.dispose()
      expect(await allocatedMemory(on)).toBeLessThanOrEqual(before)
      expect(thrown(() => graph.replay()).code).toBe('ERR_HALFBYTE_DISPOSED')
    })

    it('may go while others are captured', async () => {
      const before = await baselineMemory(on)
      const x = Tensor.from(count(1000), { device: on })
      const y = Tensor.zeros([1000], 'float32', on)
      /** y = x + 64 in many steps, with memory that goes back within the graph. */
      const make = () =>
        on.capture(() => {
          let sum = ops.add(x, 1)
          for (let i = 1; i < 64; i++) {
            const next = ops.add(sum, 1)
            sum.dispose()
            sum = next
          }
          ops.copyInto(y, sum)
          sum.dispose()
        })
      for (let round = 0; round < 10; round++) {
        const ready = Array.from({ length: 8 }, make)
        for (const graph of ready) graph.replay()
        await on.synchronize()
        for (const graph of ready) {
          ops.fillInto(y, 0)
          using other = make()
          other.replay() // captured by the device's own thread, at about the time at which this one goes
          graph.dispose()
          other.replay()
        }
        expect((await y.data())[999]).toBe(999 + 64)
      }
      x.dispose()
      y.dispose()
      expect(await allocatedMemory(on)).toBeLessThanOrEqual(before)
    })

    it('pass failures on at replay, and recover', async () => {
      using x = Tensor.from(count(4), { device: on })
      using bad = broken(x)
      let y!: Tensor
      using graph = on.capture(() => {
        y = ops.add(bad, x)
      })
      graph.replay()
      expect((await rejection(y.data())).message).toMatch(/^binary: operation 99/)
      bad.write(count(4))
      graph.replay()
      expect(await y.data()).toEqual(Float32Array.of(0, 2, 4, 6))
      y.dispose()
    })

    it('refuse to wait inside, and to nest', async () => {
      using x = Tensor.from(count(4), { device: on })
      let reading!: Promise<unknown>
      let waiting!: Promise<unknown>
      on.capture(() => {
        reading = x.data()
        waiting = on.synchronize()
        expect(thrown(() => on.capture(() => undefined)).code).toBe('ERR_HALFBYTE_USAGE')
        expect(thrown(() => x.to(other)).code).toBe('ERR_HALFBYTE_USAGE')
      }).dispose()
      expect((await rejection(reading)).code).toBe('ERR_HALFBYTE_USAGE')
      expect((await rejection(waiting)).message).toContain('inside of a capture')
    })

    it('end when the function throws', async () => {
      using x = Tensor.from(count(4), { device: on })
      expect(() =>
        on.capture(() => {
          throw new RangeError('no')
        }),
      ).toThrow('no')
      using y = ops.add(x, x)
      expect(await y.data()).toEqual(Float32Array.of(0, 2, 4, 6))
    })
  })
})

describe('two devices', () => {
  const [first, second] = devices().filter(({ type }) => type === 'cuda')
  const name = 'of two GPUs copy from one to the other, and refuse to mix'
  if (!first || !second) it.skip(`${name} (there are no two GPUs)`, () => undefined)
  else {
    it(name, async () => {
      const n = 3_000_000
      const data = count(n)
      using x = Tensor.from(data, { device: first })
      using doubled = ops.add(x, x)
      using there = doubled.to(second)
      using quadrupled = ops.add(there, there)
      using back = quadrupled.to(first)
      x.write(new Float32Array(n))
      expect(await back.data()).toEqual(data.map((v) => v * 4))
      const error = thrown(() => ops.add(x, there))
      expect(error.code).toBe('ERR_HALFBYTE_DEVICE')
      expect(error.message).toMatch(/cuda:0.*cuda:1|cuda:1.*cuda:0/)
      expect(second.memoryUsage().allocated).toBeGreaterThanOrEqual(2 * 4 * n)
    })
  }

  it('work at the same time as each other and do not mix', async () => {
    const tensors = ['cpu', 'cpu:1', 'cpu:2'].map((name) => Tensor.full([1000], 1, 'float32', name))
    for (let i = 0; i < 200; i++) for (const t of tensors) ops.addInto(t, t)
    for (const t of tensors) {
      expect((await t.data())[0]).toBe(Infinity)
      t.dispose()
    }
    expect(device('cpu:2')).not.toBe(device('cpu'))
  })
})
