/** 4-bit linear layers as bitsandbytes saved them, against its outputs and against the exact product. */
import { devices, ops, Tensor, type DType } from '../../lib/index.js'
import { readGolden, type Linear4Case } from '../support/golden.js'
import { fromBfloat16, fromFloat16, relativeError, type FloatDType } from '../support/reference.js'

/**
 * y_exact is the product in doubles: only our rounding of y is between. bitsandbytes rounds the weight and the
 * product to the compute dtype as well.
 */
const TO_EXACT: Record<FloatDType, number> = { float32: 1e-6, float16: 4e-4, bfloat16: 3e-3 }
const TO_BITSANDBYTES: Record<FloatDType, number> = { float32: 1e-5, float16: 1e-3, bfloat16: 8e-3 }

const golden = readGolden<Linear4Case>('linear4')

function values(data: ArrayLike<number>, dtype: DType): ArrayLike<number> {
  if (dtype === 'float16') return Array.from(data, fromFloat16)
  return dtype === 'bfloat16' ? Array.from(data, fromBfloat16) : data
}

describe.each(devices())('4-bit linear on %s', (device) => {
  it.each(golden.cases)('case $case: $M x $K x $N, $quant_type, blocks of $blocksize, $dtype', async (c) => {
    const tensor = (part: string) => golden.tensor(`c${c.case}.${part}`, device.name)
    const data = (part: string) => golden.data(`c${c.case}.${part}`) as ArrayLike<number>
    const statistics: { nestedAbsmax?: Tensor; nestedCode?: Tensor; offset?: Tensor } = {}
    if (c.nested) {
      const json = Buffer.from(data(`state.weight.quant_state.bitsandbytes__${c.quant_type}`) as Uint8Array)
      const { nested_offset: offset } = JSON.parse(json.toString()) as { nested_offset: number }
      statistics.nestedAbsmax = tensor('state.weight.nested_absmax')
      statistics.nestedCode = tensor('state.weight.nested_quant_map')
      statistics.offset = Tensor.from([offset], { device })
    }
    const y = ops.linear4bit(
      tensor('x'),
      {
        codes: tensor('state.weight'),
        absmax: tensor('state.weight.absmax'),
        ...statistics,
        quantType: c.quant_type,
        blocksize: c.blocksize,
        n: c.N,
        k: c.K,
      },
      { bias: c.bias ? tensor('bias') : undefined },
    )
    expect(y.shape).toEqual([c.M, c.N])
    expect(y.dtype).toBe(c.dtype)
    const actual = values((await y.data()) as Float32Array, c.dtype)
    expect(relativeError(actual, data('y_exact'))).toBeLessThan(TO_EXACT[c.dtype])
    expect(relativeError(actual, values(data('y'), c.dtype))).toBeLessThan(TO_BITSANDBYTES[c.dtype])
  })
})
