/** 8-bit blocks against bitsandbytes' bytes. */
import { devices, functional, type DType } from '../../lib/index.js'
import { native } from '../../lib/native.js'
import { readGolden } from '../support/golden.js'

interface Case {
  case: number
  dtype: DType
  blocksize: number
  signed: boolean
}

const golden = readGolden<Case>('blockwise8')

describe.each(devices())('8-bit blocks on %s', (device) => {
  it.each(golden.cases)(
    'case $case: $dtype, blocks of $blocksize, signed: $signed',
    async ({ case: number, dtype, blocksize, signed }) => {
      const x = golden.tensor(`c${number}.input`, device.name)
      const code = golden.tensor(signed ? 'code.signed' : 'code.unsigned', device.name)
      const { codes, state } = functional.quantizeBlockwise(x, { code, blocksize })
      expect(await state.absmax.data()).toEqual(golden.data(`c${number}.absmax`))
      expect(await codes.data()).toEqual(golden.data(`c${number}.q`))
      const y = functional.dequantizeBlockwise(codes, state)
      expect(y.dtype).toBe(dtype)
      expect(await y.data()).toEqual(golden.data(`c${number}.dequant`))
    },
  )
})

it('has the two dynamic maps', () => {
  expect(native.codebook('dynamic')).toEqual(golden.data('code.signed'))
  expect(native.codebook('dynamic_unsigned')).toEqual(golden.data('code.unsigned'))
})
