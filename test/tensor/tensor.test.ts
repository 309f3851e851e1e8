import { device, devices, keep, nn, ops, Tensor, tidy } from '../../lib/index'
import type { DType, TypedArray } from '../../lib/index'
import { rejection, thrown } from '../support/errors'

const codeOf = (fn: () => unknown) => thrown(fn).code
const count = (n: number) => Float32Array.from({ length: n }, (_, i) => i)

describe.each(devices())('tensors on %s', (on) => {
  const options = { device: on }
  const make = (...shape: number[]) =>
    Tensor.from(count(shape.reduce((a, b) => a * b, 1)), { shape, device: on })

  describe('making', () => {
    it.each<[DType, TypedArray]>([
      ['float32', Float32Array.of(1.5, -0, Infinity)],
      ['float16', Uint16Array.of(0x3c00, 0x7c00, 0x8001)],
      ['bfloat16', Uint16Array.of(0x3f80, 0xff80, 1)],
      ['int8', Int8Array.of(-128, 0, 127)],
      ['uint8', Uint8Array.of(0, 128, 255)],
      ['int32', Int32Array.of(-2147483648, 0, 2147483647)],
      ['int64', BigInt64Array.of(-9223372036854775808n, 0n, 9223372036854775807n)],
    ])('keeps the bits of %s', async (dtype, data) => {
      using t = Tensor.from(data, { dtype, device: on })
      expect(t.dtype).toBe(dtype)
      expect(t.nbytes).toBe(data.byteLength)
      expect(await t.data()).toEqual(data)
    })

    it('takes a window of a larger buffer, unaligned for wider types', async () => {
      const bytes = Uint8Array.from({ length: 40 }, (_, i) => i)
      using t = Tensor.from(bytes.subarray(3, 13), options)
      expect(await t.data()).toEqual(bytes.slice(3, 13))
    })

    it('copies: the array may change afterwards', async () => {
      const data = count(1000)
      using t = Tensor.from(data, options)
      data.fill(-1)
      expect(await t.data()).toEqual(count(1000))
    })

    it.each<[string, unknown]>([
      [
        'rows of 3, 4 and 2',
        [
          [1, 2, 3],
          [4, 5, 6, 7],
          [8, 9],
        ],
      ],
      [
        'a number that is a list',
        [
          [1, [2]],
          [3, 4],
        ],
      ],
      ['a list among numbers', [1, [2]]],
      ['a hole', [1, , 3]], // eslint-disable-line no-sparse-arrays -- it is what is tested
    ])('refuses %s', (_, data) => {
      expect(codeOf(() => Tensor.from(data as number[], options))).toBe('ERR_HALFBYTE_SHAPE')
    })

    it('refuses what is no shape', () => {
      for (const shape of [5, 'x', [-1], [0.5], [2 ** 60], [1, 1, 1, 1, 1, 1, 1]] as number[][]) {
        expect(codeOf(() => Tensor.from([1], { shape, device: on }))).toBe('ERR_HALFBYTE_SHAPE')
        expect(codeOf(() => Tensor.empty(shape, 'float32', on))).toBe('ERR_HALFBYTE_SHAPE')
        expect(codeOf(() => new nn.Parameter(shape))).toBe('ERR_HALFBYTE_SHAPE')
      }
      expect(codeOf(() => make(1, 3).expand(-1, 3))).toBe('ERR_HALFBYTE_SHAPE')
    })

    it('refuses an integer that is none', () => {
      for (const dtype of ['int8', 'uint8', 'int32', 'int64'] as const) {
        for (const x of [NaN, Infinity])
          expect(codeOf(() => Tensor.from([1, x], { dtype, device: on }))).toBe('ERR_HALFBYTE_VALUE')
      }
    })

    it('takes nested numbers', async () => {
      using a = Tensor.from(
        [
          [1, 2, 3],
          [4, 5, 6],
        ],
        options,
      )
      expect(a.shape).toEqual([2, 3])
      expect(await a.data()).toEqual(Float32Array.of(1, 2, 3, 4, 5, 6))
      using b = Tensor.from([true, false], { dtype: 'uint8', device: on })
      expect(await b.data()).toEqual(Uint8Array.of(1, 0))
      using c = Tensor.from([2 ** 40, -1], { dtype: 'int64', device: on })
      expect(await c.data()).toEqual(BigInt64Array.of(2n ** 40n, -1n))
      using d = Tensor.from(7, options)
      expect(d.shape).toEqual([])
      expect(await d.item()).toBe(7)
    })

    it('fills', async () => {
      using z = Tensor.zeros([2, 2], 'int32', on)
      expect(await z.data()).toEqual(new Int32Array(4))
      using f = Tensor.full([3], 1.5, 'bfloat16', on)
      expect(await f.floats()).toEqual(Float32Array.of(1.5, 1.5, 1.5))
    })

    it('has empty tensors', async () => {
      using e = Tensor.from(new Float32Array(0), { shape: [0, 5], device: on })
      expect(await e.data()).toEqual(new Float32Array(0))
      using sum = ops.add(e, e)
      expect(sum.shape).toEqual([0, 5])
      expect(await sum.data()).toEqual(new Float32Array(0))
    })

    it('refuses what is not a tensor', () => {
      expect(codeOf(() => Tensor.from(count(4), { shape: [5], device: on }))).toBe('ERR_HALFBYTE_SHAPE')
      expect(codeOf(() => Tensor.from(count(4), { dtype: 'int8', device: on }))).toBe('ERR_HALFBYTE_DTYPE')
      expect(codeOf(() => Tensor.from(new Uint16Array(4), options))).toBe('ERR_HALFBYTE_DTYPE')
      expect(codeOf(() => Tensor.from(new Float64Array(4) as never, options))).toBe('ERR_HALFBYTE_DTYPE')
      expect(codeOf(() => Tensor.from([[1, 2], [3]], options))).toBe('ERR_HALFBYTE_SHAPE')
      expect(codeOf(() => Tensor.from(['a'] as never, options))).toBe('ERR_HALFBYTE_SHAPE')
      expect(codeOf(() => Tensor.empty([-1], 'float32', on))).toBe('ERR_HALFBYTE_SHAPE')
      expect(codeOf(() => Tensor.zeros(3 as never, 'float32', on))).toBe('ERR_HALFBYTE_SHAPE')
      for (const nothing of [undefined, null, 8]) {
        expect(codeOf(() => make(2).to(nothing as never))).toBe('ERR_HALFBYTE_VALUE')
      }
      expect(codeOf(() => Tensor.empty([1.5], 'float32', on))).toBe('ERR_HALFBYTE_SHAPE')
      expect(codeOf(() => Tensor.empty([2 ** 30, 2 ** 30], 'float32', on))).toBe('ERR_HALFBYTE_SHAPE')
      expect(codeOf(() => Tensor.empty([1, 1, 1, 1, 1, 1, 1], 'float32', on))).toBe('ERR_HALFBYTE_SHAPE')
      expect(codeOf(() => Tensor.empty([1], 'float64' as never, on))).toBe('ERR_HALFBYTE_DTYPE')
    })
  })

  describe('views', () => {
    it('reshapes without a copy', async () => {
      using t = make(4, 6)
      using r = t.reshape(2, -1, 3)
      expect(r.shape).toEqual([2, 4, 3])
      expect(r.storageId).toBe(t.storageId)
      expect(await r.data()).toEqual(count(24))
      expect(codeOf(() => t.reshape(5, -1))).toBe('ERR_HALFBYTE_SHAPE')
      expect(codeOf(() => t.reshape(-1, -1))).toBe('ERR_HALFBYTE_SHAPE')
      expect(codeOf(() => t.reshape(23))).toBe('ERR_HALFBYTE_SHAPE')
    })

    it('reshapes a permuted tensor by a copy', async () => {
      using t = make(2, 3)
      using p = t.transpose(0, 1)
      using r = p.reshape(6)
      expect(r.storageId).not.toBe(t.storageId)
      expect(await r.data()).toEqual(Float32Array.of(0, 3, 1, 4, 2, 5))
    })

    it('slices along any dimension', async () => {
      using t = make(3, 4)
      using rows = t.slice(0, 1, 3)
      expect(await rows.data()).toEqual(count(12).slice(4))
      using cols = t.slice(-1, 1, 3)
      expect(cols.isContiguous).toBe(false)
      expect(await cols.data()).toEqual(Float32Array.of(1, 2, 5, 6, 9, 10))
      using inner = cols.slice(0, 2, 3)
      expect(await inner.data()).toEqual(Float32Array.of(9, 10))
      using none = t.slice(0, 3, 3)
      expect(await none.data()).toEqual(new Float32Array(0))
      expect(codeOf(() => t.slice(0, 2, 4))).toBe('ERR_HALFBYTE_SHAPE')
      expect(codeOf(() => t.slice(2, 0, 1))).toBe('ERR_HALFBYTE_SHAPE')
      expect(codeOf(() => t.slice(0, 1, 0))).toBe('ERR_HALFBYTE_SHAPE')
    })

    it('permutes', async () => {
      using t = make(2, 3, 4)
      using p = t.permute(2, 0, 1)
      expect(p.shape).toEqual([4, 2, 3])
      const data = await p.data()
      for (let i = 0; i < 4; i++) for (let j = 0; j < 6; j++) expect(data[i * 6 + j]).toBe(j * 4 + i)
      expect(codeOf(() => t.permute(0, 0, 1))).toBe('ERR_HALFBYTE_SHAPE')
      expect(codeOf(() => t.permute(0, 1))).toBe('ERR_HALFBYTE_SHAPE')
    })

    it('expands by zero strides', async () => {
      using t = make(3, 1)
      using e = t.expand(2, 3, 2)
      expect(e.storageBytes).toBe(12)
      expect(await e.data()).toEqual(Float32Array.of(0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2))
      expect(codeOf(() => t.expand(3))).toBe('ERR_HALFBYTE_SHAPE')
      expect(codeOf(() => t.expand(4, 1))).toBe('ERR_HALFBYTE_SHAPE')
    })

    it('gives the bits another type', async () => {
      using t = Tensor.from(Int8Array.of(-1, 1), options)
      using u = t.bitcast('uint8')
      expect(await u.data()).toEqual(Uint8Array.of(255, 1))
      expect(codeOf(() => t.bitcast('float32'))).toBe('ERR_HALFBYTE_DTYPE')
    })

    it('writes through a view', async () => {
      using t = Tensor.zeros([2, 3], 'float32', on)
      using column = t.slice(1, 1, 2)
      using nines = Tensor.full([2, 1], 9, 'float32', on)
      column.copyFrom(nines)
      expect(await t.data()).toEqual(Float32Array.of(0, 9, 0, 0, 9, 0))
    })
  })

  describe('reading and writing', () => {
    it('writes in queue order', async () => {
      using t = make(4)
      using before = ops.add(t, t)
      t.write(Float32Array.of(9, 9, 9, 9))
      using after = ops.add(t, t)
      t.write(count(4))
      expect(await before.data()).toEqual(Float32Array.of(0, 2, 4, 6))
      expect(await after.data()).toEqual(Float32Array.of(18, 18, 18, 18))
      expect(await t.data()).toEqual(count(4))
      expect(codeOf(() => t.write(count(5)))).toBe('ERR_HALFBYTE_SHAPE')
      expect(codeOf(() => t.write(new Int32Array(4)))).toBe('ERR_HALFBYTE_SHAPE')
    })

    it('writes a part', async () => {
      using t = make(2, 2)
      using row = t.slice(0, 1, 2)
      row.write(Float32Array.of(7, 8))
      expect(await t.data()).toEqual(Float32Array.of(0, 1, 7, 8))
    })

    it('gives every read an array of its own', async () => {
      using t = make(3)
      const [a, b] = await Promise.all([t.data(), t.data()])
      a.fill(5 as never)
      expect(b).toEqual(count(3))
    })

    it('reads more than a small result', async () => {
      using t = make(20, 1000)
      expect(await t.data()).toEqual(count(20_000))
    })

    it('reads one item', async () => {
      using t = make(1, 1)
      expect(await t.item()).toBe(0)
      using two = make(2)
      expect((await rejection(two.item())).code).toBe('ERR_HALFBYTE_SHAPE')
      using half = Tensor.from([1.5], { dtype: 'float16', device: on })
      expect(await half.item()).toBe(1.5)
    })

    it('converts', async () => {
      using t = Tensor.from([1.25, -2.75, 300], options)
      using i = t.to('int8')
      expect(await i.data()).toEqual(Int8Array.of(1, -2, 127))
      using h = t.to('float16')
      expect(await h.floats()).toEqual(Float32Array.of(1.25, -2.75, 300))
      expect(t.to('float32')).toBe(t)
      expect(t.to(on)).toBe(t)
    })
  })

  describe('life', () => {
    it('refuses a disposed tensor everywhere', async () => {
      const t = make(2, 2)
      t.dispose()
      t.dispose()
      expect(t.disposed).toBe(true)
      expect(codeOf(() => t.reshape(4))).toBe('ERR_HALFBYTE_DISPOSED')
      expect(codeOf(() => ops.add(t, t))).toBe('ERR_HALFBYTE_DISPOSED')
      expect(codeOf(() => t.write(count(4)))).toBe('ERR_HALFBYTE_DISPOSED')
      expect(codeOf(() => t.storageId)).toBe('ERR_HALFBYTE_DISPOSED')
      expect((await rejection(t.data())).code).toBe('ERR_HALFBYTE_DISPOSED')
      expect((await rejection(t.data())).message).toContain('float32 [2, 2]')
    })

    it('keeps the memory for views and queued work', async () => {
      const t = make(4)
      const view = t.slice(0, 2, 4)
      const sum = ops.add(t, t)
      t.dispose()
      expect(await view.data()).toEqual(Float32Array.of(2, 3))
      expect(await sum.data()).toEqual(Float32Array.of(0, 2, 4, 6))
      view.dispose()
      sum.dispose()
    })

    it('gives a read what was there although the tensor is disposed meanwhile', async () => {
      const t = make(4)
      const reading = t.data()
      t.dispose()
      expect(await reading).toEqual(count(4))
    })

    it('tidies', async () => {
      const made: Tensor[] = []
      const [kept, other] = tidy(() => {
        const a = make(2)
        const b = ops.add(a, a)
        const c = keep(ops.add(b, b))
        made.push(a, b, c)
        const inner = tidy(() => {
          const d = ops.add(c, c)
          made.push(d)
          return { nested: ops.add(d, d) }
        })
        made.push(inner.nested)
        return [b, c] as const
      })
      expect(made.map((t) => t.disposed)).toEqual([true, false, false, true, true])
      expect(await kept.data()).toEqual(Float32Array.of(0, 2))
      expect(await other.data()).toEqual(Float32Array.of(0, 4))
      kept.dispose()
      other.dispose()
    })

    it('tidies up after an error, and refuses a promise', () => {
      const made: Tensor[] = []
      expect(() =>
        tidy(() => {
          made.push(make(2))
          throw new RangeError('no')
        }),
      ).toThrow('no')
      expect(() => tidy(() => Promise.resolve(made.push(make(2))))).toThrow('synchronous')
      expect(made.map((t) => t.disposed)).toEqual([true, true])
    })

    it("refuses an async function, whose failure later on is nobody's", async () => {
      const later = async () => {
        const t = make(2)
        await Promise.resolve()
        ops.add(t, 1)
      }
      expect(codeOf(() => tidy(later))).toBe('ERR_HALFBYTE_USAGE')
      expect(codeOf(() => on.capture(later as () => void))).toBe('ERR_HALFBYTE_USAGE')
      await new Promise(setImmediate)
      using sum = ops.add(make(2), 1)
      expect(await sum.data()).toEqual(Float32Array.of(1, 2))
    })
  })

  it('refuses operands of two devices', () => {
    using a = make(2)
    using b = Tensor.from(count(2), { device: on.name === 'cpu' ? 'cpu:1' : 'cpu' })
    expect(codeOf(() => ops.add(a, b))).toBe('ERR_HALFBYTE_DEVICE')
  })
})

describe('devices', () => {
  it('are named', () => {
    expect(device('cpu')).toBe(device('cpu:0'))
    expect(device(device('cpu'))).toBe(device('cpu'))
    expect(device('cpu:3').name).toBe('cpu:3')
    expect(device('cpu:3').index).toBe(3)
    for (const name of ['tpu', 'cpu:', 'cpu:x', 'cpu:64', 'cpu:99999999999', 'cuda:77', '', 5, null])
      expect(codeOf(() => device(name as never))).toBe('ERR_HALFBYTE_DEVICE')
  })
})
