/** QuantState and its form in checkpoints, against state dicts that bitsandbytes wrote. */
import { devices, functional, HalfbyteError, QuantState, Tensor, type StateValue } from '../../lib/index.js'
import { jsonFloat } from '../../lib/quantization/json_float.js'
import { readGolden } from '../support/golden.js'
import { randn } from '../support/reference.js'

interface Case {
  case: number
  K: number
  N: number
  quant_type: 'nf4' | 'fp4'
  blocksize: number
  nested: boolean
  dtype: string
}

const golden = readGolden<Case>('linear4')
const parse = (bytes: unknown) =>
  JSON.parse(new TextDecoder().decode(bytes as Uint8Array)) as Record<string, unknown> & {
    nested_offset: number
  }

describe.each(devices())('QuantState on %s', (device) => {
  it.each(golden.cases)('reads and writes the state dict of case $case', async (c) => {
    const stateName = `quant_state.bitsandbytes__${c.quant_type}`
    const name = (part: string) => `c${c.case}.state.weight.${part}`
    const stored = golden.names(name(''))
    const dictionary = new Map(
      stored.map((part) => [`weight.${part}`, golden.tensor(name(part), device.name) as StateValue]),
    )
    const state = await QuantState.fromDict(dictionary)
    expect(state.shape).toEqual([c.N, c.K])
    expect(state.nested).toBe(c.nested)
    const written = await state.asDict(true)
    expect([...written.keys()].sort()).toEqual([...stored].sort())
    for (const [part, tensor] of written) expect(await tensor.data()).toEqual(golden.data(name(part)))

    // quantising the same weight gives the same text
    const own = functional.quantize4bit(golden.tensor(`c${c.case}.w`, device.name), {
      quantType: c.quant_type,
      blocksize: c.blocksize,
      compressStatistics: c.nested,
    })
    expect(await own.codes.data()).toEqual(golden.data(`c${c.case}.state.weight`))
    const ours = parse(await (await own.state.asDict(true)).get(stateName)!.data())
    const theirs = parse(golden.data(name(stateName)))
    if (c.nested) expect(ours.nested_offset / theirs.nested_offset).toBeCloseTo(1, 6)
    expect({ ...ours, nested_offset: 0 }).toEqual({ ...theirs, nested_offset: 0 })
  })

  it.each([false, true])(
    'goes through asDict() and fromDict() unpacked, nested: %s',
    async (compressStatistics) => {
      const x = Tensor.from(randn(37 * 65, 1), { shape: [37, 65], device })
      const { codes, state } = functional.quantize4bit(x, { quantType: 'nf4', compressStatistics })
      const y = await functional.dequantize4bit(codes, state).data()
      for (const packed of [true, false]) {
        const back = await QuantState.fromDict(await state.asDict(packed))
        expect(await functional.dequantize4bit(codes, back).data()).toEqual(y)
        back.dispose()
      }
      const moved = state.to(device)
      state.dispose()
      expect(await functional.dequantize4bit(codes, moved).data()).toEqual(y)
    },
  )

  it('multiplies, and dequantises by type', async () => {
    const w = Tensor.from(randn(8 * 64, 2), { shape: [8, 64], device })
    const x = Tensor.from(randn(3 * 64, 3), { shape: [3, 64], device })
    const { codes, state } = functional.quantizeNf4(w)
    const values = await functional.dequantizeNf4(codes, state).floats()
    const input = await x.floats()
    const y = await functional.matmul4bit(x, codes, state).floats()
    y.forEach((v, i) => {
      const [m, n] = [Math.floor(i / 8), i % 8]
      let sum = 0
      for (let k = 0; k < 64; k++) sum += input[m * 64 + k]! * values[n * 64 + k]!
      expect(v).toBeCloseTo(sum, 4)
    })
    expect(() => functional.dequantizeFp4(codes, state)).toThrow(/nf4/)
  })

  it('refuses broken dictionaries', async () => {
    const { state } = functional.quantize4bit(Tensor.from(randn(64, 1), { device }), {
      compressStatistics: true,
    })
    const good = await state.asDict()
    const broken: [string, StateValue, RegExp][] = [
      ['quant_type', 'int4', /quant_type/],
      ['blocksize', -1, /blocksize/],
      ['dtype', 'int8', /dtype/],
      ['shape', [1.5], /shape/],
      ['shape', [640], /absmax/],
      ['nested_blocksize', 64, /256/],
      ['nested_offset', 'x', /nested_offset/],
      ['quant_map', Tensor.zeros([16], 'float32', device), /quant_map/],
      ['nested_absmax', Tensor.zeros([2], 'float32', device), /nested_absmax/],
      ['absmax', Tensor.zeros([1], 'float32', device), /uint8/],
      ['surprise', 1, /surprise/],
    ]
    for (const [name, value, message] of broken) {
      const promise = QuantState.fromDict(new Map([...good, [name, value]]))
      await expect(promise).rejects.toThrow(message)
      await expect(promise).rejects.toBeInstanceOf(HalfbyteError)
    }
    const json = new Map<string, StateValue>([
      ['quant_state.bitsandbytes__nf4', new TextEncoder().encode('{"a"')],
    ])
    await expect(QuantState.fromDict(json)).rejects.toThrow(/JSON/)
  })
})

it('writes floats as Python does', () => {
  const expected: [number, string][] = [
    [0, '0.0'],
    [-0, '-0.0'],
    [3, '3.0'],
    [-120, '-120.0'],
    [0.1, '0.1'],
    [2.6351726055145264, '2.6351726055145264'],
    [0.0001, '0.0001'],
    [0.00001, '1e-05'],
    [1.5e-7, '1.5e-07'],
    [1e-101, '1e-101'],
    [123456789012345680, '1.2345678901234568e+17'],
    [1e16, '1e+16'],
    [9007199254740992, '9007199254740992.0'],
    [1e22, '1e+22'],
    [NaN, 'NaN'],
    [-Infinity, '-Infinity'],
  ]
  for (const [x, written] of expected) expect(jsonFloat(x)).toBe(written)
})
