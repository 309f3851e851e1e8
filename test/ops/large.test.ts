/** More than 2^31 elements: indices of 64 bits everywhere. On GPUs with room for them. */
import { devices, ops, Tensor, type Device } from '../../lib/index.js'
import { native } from '../../lib/native.js'
import { randn } from '../support/reference.js'

const NEEDED = 16e9
jest.setTimeout(60_000) // tests of other files may be at work on the same GPU
const PERIOD = 65536
const ROWS = 2 ** 31 / PERIOD + 3

const roomy = devices().filter((d) => d.type === 'cuda' && d.memoryUsage().free >= NEEDED)

/** Rows at the beginning, around 2^30 and 2^31 elements, and at the end: all of them are the same. */
const LOOKED_AT = [0, 1, ROWS / 2, ROWS - 4, ROWS - 3, ROWS - 2, ROWS - 1].map(Math.floor)

/** PERIOD numbers in bfloat16, again and again, and those numbers. */
function repeated(device: Device): { x: Tensor; row: Tensor } {
  using wide = Tensor.from(randn(PERIOD, 1), { shape: [1, PERIOD], device })
  const row = wide.to('bfloat16')
  using all = row.expand(ROWS, PERIOD)
  return { x: all.clone(), row }
}

async function expectRows(found: Tensor, expected: Tensor): Promise<void> {
  using rows = found.reshape(ROWS, found.size / ROWS)
  using flat = expected.reshape(1, expected.size)
  const wanted = await flat.data()
  for (const row of LOOKED_AT) {
    using part = rows.slice(0, row, row + 1)
    expect(await part.data()).toEqual(wanted)
  }
}

if (roomy.length === 0) {
  it.skip(`more than 2^31 elements (no GPU with ${NEEDED / 1e9} GB free)`, () => undefined)
} else {
  describe.each(roomy)('more than 2^31 elements on %s', (device) => {
    it.each(['nf4', 'fp4'] as const)('in blocks of %s and back', async (quantType) => {
      const { x, row } = repeated(device)
      const made = ops.quantizeBlocks4(x, quantType, 64)
      const expected = ops.quantizeBlocks4(row, quantType, 64)
      await expectRows(made.codes, expected.codes)
      await expectRows(made.absmax, expected.absmax)
      x.dispose()
      const weight = { ...made, quantType, blocksize: 64, n: ROWS, k: PERIOD }
      using y = ops.dequantizeBlocks4(weight, 'bfloat16')
      using values = ops.dequantizeBlocks4({ ...weight, ...expected, n: 1 }, 'bfloat16')
      await expectRows(y, values)
      for (const t of [row, ...Object.values(made), ...Object.values(expected)]) t.dispose()
    })

    it('in 8-bit blocks and back', async () => {
      using code = Tensor.from(native.codebook('dynamic'), { device })
      const { x, row } = repeated(device)
      const made = ops.quantizeBlocks8(x, code, 4096)
      const expected = ops.quantizeBlocks8(row, code, 4096)
      await expectRows(made.codes, expected.codes)
      await expectRows(made.absmax, expected.absmax)
      x.dispose()
      using y = ops.dequantizeBlocks8(made.codes, made.absmax, code, 4096, 'bfloat16')
      using values = ops.dequantizeBlocks8(expected.codes, expected.absmax, code, 4096, 'bfloat16')
      await expectRows(y, values)
      for (const t of [row, ...Object.values(made), ...Object.values(expected)]) t.dispose()
    })

    it('turned and turned back, added and normed', async () => {
      const { x, row } = repeated(device)
      using turned = x.transpose(0, 1)
      using columns = turned.clone()
      x.dispose()
      using back = columns.transpose(0, 1)
      using y = back.clone()
      await expectRows(y, row)
      columns.dispose()
      using weight = Tensor.full([PERIOD], 2, 'bfloat16', device)
      for (const op of [
        (t: Tensor) => ops.add(t, t),
        (t: Tensor) => ops.activation(t, 'silu'),
        (t: Tensor) => ops.rmsNorm(t, weight, 1e-5),
      ]) {
        using found = op(y)
        using expected = op(row)
        await expectRows(found, expected)
      }
      row.dispose()
    })
  })
}
