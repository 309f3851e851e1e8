import { devices, ops, Tensor, type DType } from '../../lib/index'
import { readElements } from '../../lib/tensor/read'
import { rejection } from '../support/errors'
import { allocatedMemory, baselineMemory } from '../support/memory'

describe.each(devices())('reading by pieces on %s', (on) => {
  const numbers = Array.from({ length: 1000 }, (_, i) => (i * 7) % 127)

  it.each<DType>(['float32', 'float16', 'bfloat16', 'int8', 'uint8', 'int32', 'int64'])(
    'gives the elements of %s',
    async (dtype) => {
      using t = Tensor.from(numbers, { dtype, device: on, shape: [10, 100] })
      const whole = await readElements(t)
      for (const bytes of [8, 64, 1000, 1024, 1 << 20]) expect(await readElements(t, bytes)).toEqual(whole)
    },
  )

  it('gives them as they were when it was called', async () => {
    using t = Tensor.from(numbers, { device: on })
    const before = readElements(t, 64)
    t.write(new Float32Array(1000).fill(-1))
    expect(await before).toEqual(Float32Array.from(numbers))
    expect(await readElements(t, 64)).toEqual(new Float32Array(1000).fill(-1))
  })

  it('leaves nothing behind', async () => {
    const used = await baselineMemory(on)
    const t = Tensor.from(numbers, { device: on })
    const read = readElements(t, 64)
    t.dispose()
    await read
    expect(await allocatedMemory(on)).toBe(used)
  })

  it('rejects with the failure of what was to be read', async () => {
    using one = Tensor.zeros([1, 1], 'float32', on)
    using many = one.expand(2 ** 44, 1)
    using failed = ops.add(many, 1)
    using part = failed.slice(0, 0, 100).reshape(100)
    expect((await rejection(readElements(part, 64))).code).toBe('ERR_HALFBYTE_OUT_OF_MEMORY')
  })

  it('of more than Node has an array for is an error', async () => {
    using t = Tensor.empty([2 ** 49], 'uint8', on)
    const error = await rejection(t.data())
    expect(error.code).toBe('ERR_HALFBYTE_OUT_OF_MEMORY')
    expect(error.message).toContain('slice by slice')
  })
})
