/** Ranges of files as tensors, and what becomes of them when the file does not keep its word. */
import { mkdirSync, truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { devices, DTYPES, ops, Tensor, tidy } from '../../lib/index'
import { native } from '../../lib/native'
import { rethrow } from '../../lib/tensor/rethrow'
import { temporaryFolder } from '../support/files'
import { rejection, thrown } from '../support/errors'
import { baselineMemory } from '../support/memory'

const folder = temporaryFolder()
const write = (name: string, data: Uint8Array): string => {
  const path = join(folder, name)
  writeFileSync(path, data)
  return path
}
const open = (path: string) => rethrow(() => native.openFile(path))

describe.each(devices())('files on %s', (on) => {
  const bytes = Uint8Array.from({ length: 5000 }, (_, i) => i * 7)
  const path = write('good.bin', bytes)
  const load = (file: ReturnType<typeof open>, shape: number[], offset: number) =>
    new Tensor(
      rethrow(() => file.tensor(on.native, DTYPES.uint8.id, shape, offset)),
      on,
      'uint8',
      shape,
    )

  it('give their size, bytes, and tensors at any offset', async () => {
    const file = open(path)
    expect(file.size).toBe(5000)
    expect(new Uint8Array(file.bytes(13, 20))).toEqual(bytes.slice(13, 20))
    expect(file.bytes(5000, 5000).byteLength).toBe(0)
    using whole = load(file, [50, 100], 0)
    using part = load(file, [3, 33], 4901)
    using none = load(file, [0], 5000)
    file.close()
    file.close()
    expect(await whole.data()).toEqual(bytes)
    expect(await part.data()).toEqual(bytes.slice(4901))
    expect(await none.data()).toEqual(new Uint8Array(0))
    expect(thrown(() => rethrow(() => file.bytes(0, 1))).code).toBe('ERR_HALFBYTE_DISPOSED')
  })

  it('feed ops, which wait for them', async () => {
    const big = write('big.bin', new Uint8Array(8 << 20).fill(3))
    const file = open(big)
    for (let i = 0; i < 10; i++) {
      using x = load(file, [8 << 20], 0)
      using y = x.to('int32')
      using z = ops.add(y, y)
      using last = z.slice(0, (8 << 20) - 1, 8 << 20)
      expect(await last.item()).toBe(6)
    }
    file.close()
  })

  describe('of many pieces', () => {
    const size = (90 << 20) + 12_345
    const long = new Uint8Array(size)
    let path = ''
    beforeAll(() => {
      const words = new Uint32Array(long.buffer, 0, size >> 2)
      for (let i = 0; i < words.length; i++) words[i] = Math.imul(i, 2654435761)
      path = write('long.bin', long)
    })
    const check = async (tensor: Tensor, begin: number) => {
      const data = (await tensor.data()) as Uint8Array
      expect(Buffer.compare(data, long.subarray(begin, begin + data.length))).toBe(0)
    }

    it('arrive whole and in order, more than there are buffers at once', async () => {
      const file = open(path)
      const begins = [1, 3 << 20, (70 << 20) + 7, 5]
      const lengths = [size - 1, (20 << 20) + 3, 4 << 20, 0]
      const tensors = begins.map((begin, i) => load(file, [lengths[i]!], begin))
      file.close()
      for (const [i, tensor] of tensors.entries()) {
        await check(tensor, begins[i]!)
        tensor.dispose()
      }
    })

    it('can be given up, and others come all the same', async () => {
      const file = open(path)
      for (let i = 0; i < 6; i++) load(file, [size], 0).dispose()
      using last = load(file, [size], 0)
      await check(last, 0)
      file.close()
    })

    it('take their memory after what they are to come after', async () => {
      const file = open(path)
      using token = Tensor.zeros([1], 'uint8', on)
      const before = await baselineMemory(on)
      for (let i = 0; i < 8; i++) {
        const handle = rethrow(() => file.tensor(on.native, DTYPES.uint8.id, [size], 0, token.handle))
        tidy(() => {
          const x = new Tensor(handle, on, 'uint8', [size])
          ops.countNonfinite(x.slice(0, 0, 16 << 20).bitcast('float32'))
        })
        ops.fillInto(token, 0)
      }
      await on.synchronize()
      expect(on.memoryUsage().peak - before).toBeLessThan(size * 1.3)
      file.close()
    })

    it('that are cut short in the middle fail, and only they do', async () => {
      const cut = write('cut-long.bin', long)
      const file = open(cut)
      truncateSync(cut, 30 << 20)
      using lost = load(file, [60 << 20], 0)
      using there = load(file, [29 << 20], 0)
      const error = await rejection(lost.data())
      expect(error.code).toBe('ERR_HALFBYTE_IO')
      expect(error.message).toContain(`the file ends at byte ${30 << 20}`)
      await check(there, 0)
      file.close()
    })
  })

  it('refuse ranges outside', () => {
    const file = open(path)
    for (const [shape, offset] of [
      [[5001], 0],
      [[1], 5000],
      [[2 ** 40], 0],
      [[1], 2 ** 52],
    ] as const) {
      const error = thrown(() => load(file, [...shape], offset))
      expect(error.code).toBe('ERR_HALFBYTE_IO')
      expect(error.message).toContain(path)
    }
    expect(thrown(() => rethrow(() => file.bytes(10, 9))).code).toBe('ERR_HALFBYTE_IO')
    expect(thrown(() => rethrow(() => file.bytes(0, 5001))).code).toBe('ERR_HALFBYTE_IO')
    file.close()
  })

  it('that are cut short meanwhile are an error of what is read from them', async () => {
    const cut = write('cut.bin', new Uint8Array(100_000).fill(1))
    const file = open(cut)
    truncateSync(cut, 50_000)
    using lost = load(file, [60_000], 10)
    using there = load(file, [40_000], 10)
    using depends = ops.add(lost.to('int32'), 1)
    const error = await rejection(depends.data())
    expect(error.code).toBe('ERR_HALFBYTE_IO')
    expect(error.message).toContain(`${cut}: the file ends at byte 50000`)
    expect((await there.data())[39_999]).toBe(1)
    expect(thrown(() => rethrow(() => file.bytes(0, 60_000))).code).toBe('ERR_HALFBYTE_IO')
    file.close()
  })

  it('that cannot be opened say why', () => {
    const missing = join(folder, 'missing.bin')
    expect(thrown(() => open(missing)).message).toBe(`${missing} cannot be opened: No such file or directory`)
    mkdirSync(join(folder, 'sub'), { recursive: true })
    expect(thrown(() => open(join(folder, 'sub'))).message).toContain('is not a regular file')
    expect(thrown(() => open(`${path}/x`)).code).toBe('ERR_HALFBYTE_IO')
    expect(thrown(() => open('')).code).toBe('ERR_HALFBYTE_IO')
    const empty = open(write('empty.bin', new Uint8Array(0)))
    expect(empty.size).toBe(0)
    empty.close()
  })
})
