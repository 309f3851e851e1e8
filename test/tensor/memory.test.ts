/** Whose memory it is, and that it comes back. */
import { devices, ops, Tensor } from '../../lib/index'
import { rejection, thrown } from '../support/errors'
import { allocatedMemory, baselineMemory } from '../support/memory'

const MiB = 1 << 20

describe.each(devices())('memory of %s', (on) => {
  it('comes back when tensors are disposed', async () => {
    const before = await baselineMemory(on)
    const tensors = Array.from({ length: 8 }, () => Tensor.full([MiB / 4], 1, 'float32', on))
    expect(await allocatedMemory(on)).toBeGreaterThanOrEqual(before + 8 * MiB)
    for (const t of tensors) t.dispose()
    expect(await allocatedMemory(on)).toBeLessThanOrEqual(before)
    const after = on.memoryUsage()
    expect(after.peak).toBeGreaterThanOrEqual(before + 8 * MiB)
    on.resetPeakMemory()
    expect(on.memoryUsage().peak).toBe(before)
    expect(after.total).toBeGreaterThan(0)
    expect(after.free).toBeLessThanOrEqual(after.total)
    expect(after.reserved).toBeGreaterThanOrEqual(after.allocated)
  })

  it('is taken in the order of the queue, so a chain of temporaries needs little', async () => {
    const before = await baselineMemory(on)
    let x = Tensor.full([MiB / 4], 1, 'float32', on)
    for (let i = 0; i < 64; i++) {
      const next = ops.activation(x, 'relu')
      x.dispose()
      x = next
    }
    expect((await x.data())[0]).toBe(1)
    x.dispose()
    await on.synchronize()
    expect(on.memoryUsage().peak).toBeLessThanOrEqual(before + 3 * MiB)
  })

  it('does not leak in a loop of every kind of call', async () => {
    const turn = async () => {
      using x = Tensor.from(new Float32Array(4096), { device: on })
      using y = ops.add(x, 1)
      using z = y.to('bfloat16')
      using v = z.slice(0, 1, 100)
      using w = v.reshape(3, 33)
      y.write(new Float32Array(4096))
      using graph = on.capture(() => ops.add(y, x).dispose())
      graph.replay()
      using b = Tensor.from(new Float32Array(4096), { device: on, copy: false })
      await Promise.all([w.data(), b.data(), on.synchronize()])
    }
    await turn()
    const before = await baselineMemory(on)
    for (let i = 0; i < 200; i++) await turn()
    // what earlier tests left to the garbage collector may go meanwhile
    expect(await allocatedMemory(on)).toBeLessThanOrEqual(before)
  })

  it('of an array is borrowed with copy: false, and not let go while in use', async () => {
    const data = Float32Array.of(1, 2, 3, 4)
    using t = Tensor.from(data, { device: on, copy: false })
    await on.synchronize()
    if (on.type === 'cpu') {
      data[0] = 9
      expect(await t.data()).toEqual(Float32Array.of(9, 2, 3, 4))
      using view = t.slice(0, 0, 1)
      view.write(Float32Array.of(5))
      await on.synchronize()
      expect(data[0]).toBe(5)
    }
    // An ArrayBuffer that is marked untransferable is copied, or refused, or taken away all the same, by the version
    // of Node.
    const { buffer } = data as { buffer: ArrayBuffer & { transfer?: () => ArrayBuffer } }
    for (const take of [() => structuredClone(buffer, { transfer: [buffer] }), () => buffer.transfer?.()]) {
      try {
        take()
      } catch (error) {
        expect((error as Error).message).toMatch(/clone|transfer|detach/i)
      }
    }
    if (on.type === 'cpu' && data.byteLength === 0) {
      expect(thrown(() => ops.add(t, t)).message).toContain('transferred away')
      expect((await rejection(t.data())).code).toBe('ERR_HALFBYTE_VALUE')
    } else {
      using sum = ops.add(t, t)
      expect((await sum.data())[1]).toBe(4)
    }
  })

  describe('that is not to be had', () => {
    // all of a GPU, of which the context has taken a part; the host may promise more than it has
    const bytes = on.type === 'cuda' ? on.memoryUsage().total : 2 ** 49

    /** Bytes asked and free in the message of the error. */
    const expectRefusal = async (promise: Promise<unknown>, asked: number) => {
      const { code, message } = await rejection(promise)
      expect(code).toBe('ERR_HALFBYTE_OUT_OF_MEMORY')
      const found = /(\w+(?::\d)?): (\d+) bytes asked, (\d+) of (\d+) free; dispose tensors/.exec(message)
      expect(found?.slice(1, 3)).toEqual([on.name, String(asked)])
      expect(Number(found![3])).toBeLessThanOrEqual(Number(found![4]))
      expect(Number(found![4])).toBe(on.memoryUsage().total)
    }

    it('is an error with the bytes asked and free, and the device goes on', async () => {
      const before = await baselineMemory(on)
      for (let i = 0; i < 20; i++) {
        using huge = Tensor.empty([bytes], 'uint8', on)
        ops.fillInto(huge, 1)
        using part = huge.slice(0, 0, 4)
        await expectRefusal(part.data(), bytes)
      }
      using x = Tensor.full([MiB], 2, 'float32', on)
      using graph = on.capture(() => ops.addInto(x, x))
      graph.replay()
      using w = Tensor.full([8, 64], 1, 'float32', on)
      using row = Tensor.full([1, 64], 2, 'float32', on)
      using y = ops.linear(row, w)
      expect(await y.data()).toEqual(new Float32Array(8).fill(128))
      expect((await x.data())[MiB - 1]).toBe(4)
      for (const tensor of [x, w, row, y]) tensor.dispose()
      graph.dispose()
      expect(await allocatedMemory(on)).toBeLessThanOrEqual(before)
    })

    it('for a result spoils that result alone', async () => {
      const side = Math.ceil(Math.sqrt(bytes / 4))
      using column = Tensor.full([side, 1], 1, 'float32', on)
      using ones = Tensor.full([side, 1], 3, 'float32', on)
      using table = ops.linear(column, ones)
      using first = table.slice(0, 0, 1).slice(1, 0, 1)
      await expectRefusal(first.data(), 4 * side * side)
      using sum = ops.add(column, ones)
      using some = sum.slice(0, 0, 2)
      expect(await some.contiguous().data()).toEqual(Float32Array.of(4, 4))
    })

    it('in a graph spoils what depends on it, and leaves the next one alone', async () => {
      using state = Tensor.zeros([4], 'float32', on)
      using one = Tensor.full([4], 1, 'float32', on)
      let huge!: Tensor
      const graph = on.capture(() => {
        huge = Tensor.empty([bytes], 'uint8', on)
        ops.fillInto(huge, 1)
        ops.addInto(state, one)
      })
      graph.replay()
      const part = huge.slice(0, 0, 4)
      await expectRefusal(part.data(), bytes)
      expect(await state.data()).toEqual(new Float32Array(4).fill(1))
      graph.dispose()
      part.dispose()
      huge.dispose()
      using fine = on.capture(() => ops.addInto(state, one))
      fine.replay()
      fine.replay()
      expect(await state.data()).toEqual(new Float32Array(4).fill(3))
    })
  })

  it('that can change size, is shared or is gone is refused', () => {
    const shared = new Float32Array(new SharedArrayBuffer(16))
    const Resizable = ArrayBuffer as unknown as new (n: number, o: { maxByteLength: number }) => ArrayBuffer
    const resizable = new Float32Array(new Resizable(16, { maxByteLength: 64 }))
    const gone = new Float32Array(4)
    structuredClone(gone.buffer, { transfer: [gone.buffer] })
    for (const copy of [true, false]) {
      for (const data of [shared, resizable]) {
        const error = thrown(() => Tensor.from(data, { device: on, copy }))
        expect(error.code).toBe('ERR_HALFBYTE_VALUE')
        expect(error.message).toMatch(/SharedArrayBuffer|resizable/)
      }
      expect(thrown(() => Tensor.from(gone, { shape: [4], device: on, copy })).code).toBe(
        'ERR_HALFBYTE_SHAPE',
      )
    }
  })

  it('on the host is known to V8, which collects tensors that nobody disposed', async () => {
    if (on.type !== 'cpu') return
    const before = await baselineMemory(on)
    for (let i = 0; i < 40; i++) {
      Tensor.full([8 * MiB], 1, 'uint8', on)
      await on.synchronize()
    }
    expect(on.memoryUsage().peak - before).toBeLessThan(40 * 8 * MiB * 0.7)
  })
})
