/** LLM.int8() against bitsandbytes' own results: quantised bytes and int32 sums equal, scaled results as rounded. */
import { devices, ops, Tensor, tidy } from '../../lib/index.js'
import { readGolden, type Int8Case } from '../support/golden.js'
import { fromFloat16, halfValues, relativeError } from '../support/reference.js'

const int8 = readGolden<Int8Case>('int8')
const training = readGolden<{ threshold: number }>('int8_training')

/** Largest difference of float16 results, in units of the last place; below `slack` a difference counts as one. */
function halfSteps(a: ArrayLike<number>, b: ArrayLike<number>, slack = 0): number {
  const line = (h: number): number => (h & 0x8000 ? -(h & 0x7fff) : h)
  let most = a.length === b.length ? 0 : Infinity
  for (let i = 0; i < b.length; i++) {
    const steps = Math.abs(line(a[i]!) - line(b[i]!))
    const small = Math.abs(fromFloat16(a[i]!) - fromFloat16(b[i]!)) < slack
    most = Math.max(most, small ? Math.min(steps, 1) : steps)
  }
  return most
}

describe.each(devices())('int8 golden on %s', (device) => {
  const on = device.name

  it.each(int8.cases)(
    'case $case: [$M, $K] x [$N, $K], threshold $threshold, $outliers outliers',
    async (c) => {
      const name = (part: string) => `c${c.case}.${part}`
      const of = (part: string) => int8.tensor(name(part), on)
      const w = ops.int8QuantizeRows(of('w'), 0, true)
      const x = ops.int8QuantizeRows(of('x'), c.threshold, true)
      expect(await w.codes.data()).toEqual(int8.data(name('w_q')))
      expect(await w.rowAbsmax.data()).toEqual(int8.data(name('w_stats')))
      expect(await x.codes.data()).toEqual(int8.data(name('x_q')))
      expect(await x.rowAbsmax.data()).toEqual(int8.data(name('x_stats')))
      if (x.outlierMask) {
        const mask = await x.outlierMask.data()
        const columns = Array.from(mask as Uint8Array).flatMap((hit, column) => (hit ? [column] : []))
        expect(columns).toEqual(Array.from(int8.data(name('outlier_cols')) as BigInt64Array, Number))
      }

      const acc = ops.int8Matmul(x.codes, w.codes)
      expect(await acc.data()).toEqual(int8.data(name('acc')))
      const scaled = ops.int8MatmulDequantize(acc, x.rowAbsmax, w.rowAbsmax)
      expect(await scaled.data()).toEqual(int8.data(name('mm_dequant')))

      const bias = c.bias ? of('bias') : undefined
      const golden = int8.data(name('y')) as Uint16Array
      const options = { bias, threshold: c.threshold }
      const exact = await ops.linear8bit(of('x'), w.codes, w.rowAbsmax, { ...options, bnbExact: true }).data()
      // the order of the outlier product's sum is not defined, which shows where it cancels the rest
      expect(halfSteps(exact as Uint16Array, golden, 1e-6)).toBeLessThanOrEqual(c.outliers ? 1 : 0)

      // our own rounding is at least as close to the product with the original weight, but for chance
      const truth = int8.data(name('y_exact')) as Float32Array
      const own = await ops.linear8bit(of('x'), w.codes, w.rowAbsmax, options).floats()
      expect(relativeError(own, truth)).toBeLessThan(1.005 * relativeError(halfValues(golden), truth))
    },
  )

  it('training forward: a float16 weight quantised on the way', async () => {
    const y = tidy((): Tensor => {
      const w = ops.int8QuantizeRows(training.tensor('w', on), 0, true)
      return ops.linear8bit(training.tensor('x', on), w.codes, w.rowAbsmax, {
        bias: training.tensor('bias', on),
        threshold: training.cases[0]!.threshold,
        bnbExact: true,
      })
    })
    expect(halfSteps((await y.data()) as Uint16Array, training.data('y') as Uint16Array)).toBeLessThanOrEqual(
      1,
    )
  })
})
