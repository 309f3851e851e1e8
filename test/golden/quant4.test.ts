/** 4-bit blocks against bitsandbytes' bytes. */
import { devices, functional, ops, QuantState, Tensor, type DType } from '../../lib/index.js'
import { readGolden } from '../support/golden.js'

interface Case {
  case: number
  quant_type: 'nf4' | 'fp4'
  dtype: DType
  blocksize: number
  nested: boolean
  shape: number[]
  offset?: number
}

const golden = readGolden<Case>('quant4')

/** Codes one by one; those of all-zero blocks are free (bitsandbytes' own devices differ there). */
function nibbles(packed: Uint8Array, absmax: Float32Array, blocksize: number, n: number): Buffer {
  const codes = Buffer.alloc(n, 255)
  for (let i = 0; i < n; i++) {
    if (absmax[Math.floor(i / blocksize)] === 0) continue
    codes[i] = i % 2 === 0 ? packed[i >> 1]! >> 4 : packed[i >> 1]! & 15
  }
  return codes
}

function ulps(a: number, b: number): number {
  const [x, y] = new Int32Array(Float32Array.of(a, b).buffer)
  return Math.abs(x! - y!)
}

describe.each(devices())('4-bit blocks on %s', (device) => {
  it.each(golden.cases)(
    'case $case: $quant_type, $dtype, blocks of $blocksize, nested: $nested',
    async (c) => {
      const name = (part: string) => `c${c.case}.${part}`
      const x = golden.tensor(name('input'), device.name)
      const n = x.size
      const { codes, state } = functional.quantize4bit(x, {
        quantType: c.quant_type,
        blocksize: c.blocksize,
        compressStatistics: c.nested,
      })
      const plain = functional.quantize4bit(x, { quantType: c.quant_type, blocksize: c.blocksize })
      const absmax = (await plain.state.absmax.data()) as Float32Array
      const expected = golden.data(name('packed')) as Uint8Array
      const actual = (await codes.data()) as Uint8Array
      expect(codes.shape).toEqual(golden.stored(name('packed')).shape)
      const found = nibbles(actual, absmax, c.blocksize, n)
      expect(found.equals(nibbles(expected, absmax, c.blocksize, n))).toBe(true)

      if (c.nested) {
        expect(await state.absmax.data()).toEqual(golden.data(name('absmax')))
        expect(ulps(await state.offset!.item(), c.offset!)).toBeLessThanOrEqual(2)
      } else {
        expect(absmax).toEqual(golden.data(name('absmax')))
      }

      // bitsandbytes' own codes and statistics, so that every bit of the result is determined
      const theirs = new QuantState({
        absmax: golden.tensor(name('absmax'), device.name),
        shape: c.shape,
        blocksize: c.blocksize,
        quantType: c.quant_type,
        dtype: c.dtype,
        ...(c.nested && {
          offset: Tensor.from(Float32Array.of(c.offset!), { device }),
          state2: {
            absmax: golden.tensor(name('nested_absmax'), device.name),
            code: golden.tensor('nested_code', device.name),
            blocksize: 256,
            dtype: 'float32' as const,
          },
        }),
      })
      const y = functional.dequantize4bit(golden.tensor(name('packed'), device.name), theirs)
      expect(y.dtype).toBe(c.dtype)
      expect(y.shape).toEqual(c.shape)
      const bytes = (data: ArrayBufferView) => Buffer.from(data.buffer, data.byteOffset, data.byteLength)
      expect(bytes(await y.data()).equals(bytes(golden.data(name('dequant'))))).toBe(true)
    },
  )

  it.each(golden.cases.filter((c) => c.nested))(
    'statistics of case $case: all bits given the offset, which differs in its last ones',
    async (c) => {
      const x = golden.tensor(`c${c.case}.input`, device.name)
      const options = { quantType: c.quant_type, blocksize: c.blocksize }
      const { state: plain } = functional.quantize4bit(x, options)
      const offset = Tensor.from(Float32Array.of(c.offset!), { device })
      const [codes, nested] = ['absmax', 'nested_absmax'].map((part) => golden.data(`c${c.case}.${part}`))
      const given = functional.quantizeBlockwise(ops.sub(plain.absmax, offset), { blocksize: 256 })
      expect(await given.codes.data()).toEqual(codes)
      expect(await given.state.absmax.data()).toEqual(nested)

      // with its own offset, a mean that is summed in another order, the largest of what is left is off by as much
      const { state } = functional.quantize4bit(x, { ...options, compressStatistics: true })
      const difference = Math.abs((await state.offset!.item()) - c.offset!)
      const own = (await state.state2!.absmax.data()) as Float32Array
      for (const [i, wanted] of (nested as Float32Array).entries())
        expect(Math.abs(own[i]! - wanted)).toBeLessThanOrEqual(difference + wanted * 2 ** -23)
    },
  )
})
