/** 4-bit linear against the product, in doubles, with the weight that its codes stand for. */
import { native } from '../../lib/native.js'
import { devices, ops, Tensor, type Device } from '../../lib/index.js'
import { rejection, thrown } from '../support/errors.js'
import { expectProduct, randomOperand } from '../support/product.js'
import { FLOATS, relativeError, uniform, type FloatDType } from '../support/reference.js'

const { floor, fround } = Math // looking up globals is slow inside jest

interface Packed {
  weight: Parameters<typeof ops.linear4bit>[1]
  values: Float64Array
}

interface Format {
  quantType?: 'nf4' | 'fp4'
  blocksize?: number
  nested?: boolean
  /** What the values of the nested map are times those of the dynamic one. */
  mapScale?: number
}

const DYNAMIC = native.codebook('dynamic')

/** A weight of random codes and statistics, and its values: codebook[code] * absmax in float32. */
function randomPacked(n: number, k: number, on: Device, format: Format): Packed {
  const { quantType = 'nf4', blocksize = 64, nested = false, mapScale = 1 } = format
  const random = uniform(n * 31 + k)
  const codes = new Uint8Array(Math.ceil((n * k) / 2))
  for (let i = 0; i < codes.length; ++i) codes[i] = 256 * random()
  const blocks = Math.ceil((n * k) / blocksize)
  const absmax = Float32Array.from({ length: blocks }, () => 0.1 + random())
  const tensor = (data: Float32Array | Uint8Array) => Tensor.from(data, { device: on })
  const weight = { codes: tensor(codes), quantType, blocksize, n, k }
  const scales = { absmax: tensor(absmax), nestedAbsmax: {}, nestedCode: {}, offset: {} }
  if (nested) {
    const map = DYNAMIC.map((value) => mapScale * value)
    const quantised = Uint8Array.from({ length: blocks }, () => 256 * random())
    const outer = Float32Array.from({ length: Math.ceil(blocks / 256) }, () => 0.2 + 0.1 * random())
    for (let b = 0; b < blocks; ++b)
      absmax[b] = Math.fround(map[quantised[b]!]! * outer[b >> 8]!) + Math.fround(0.4)
    Object.assign(scales, {
      absmax: tensor(quantised),
      nestedAbsmax: tensor(outer),
      nestedCode: tensor(map),
      offset: tensor(Float32Array.of(0.4)),
    })
  }
  const book = native.codebook(quantType)
  const values = new Float64Array(n * k)
  for (let i = 0; i < values.length; ++i) {
    const pair = codes[i >> 1]!
    values[i] = fround(book[i % 2 ? pair & 15 : pair >> 4]! * absmax[floor(i / blocksize)]!)
  }
  const { nestedAbsmax, nestedCode, offset } = scales as unknown as Record<string, Tensor>
  return {
    weight: {
      ...weight,
      absmax: scales.absmax,
      ...(nested ? { nestedAbsmax, nestedCode, offset } : {}),
    },
    values,
  }
}

async function check(
  on: Device,
  [m, n, k]: readonly [number, number, number],
  format: Format = {},
  dtype: FloatDType = 'float32',
  extras = false,
): Promise<void> {
  const { weight, values } = randomPacked(n, k, on, format)
  const x = randomOperand([m, k], dtype, on, 1)
  const bias = extras ? randomOperand([n], 'float32', on, 2) : undefined
  const residual = extras ? randomOperand([m, n], dtype, on, 3) : undefined
  const y = ops.linear4bit(x.tensor, weight, { bias: bias?.tensor, residual: residual?.tensor })
  await expectProduct(y, x.values, values, k, bias?.values, residual?.values)
}

/** As many elements, which are not contiguous. */
const strided = (t: Tensor): Tensor => Tensor.zeros([t.size, 2], t.dtype, t.device).slice(-1, 0, 1)

const BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]

describe.each(devices())('4-bit linear on %s', (on) => {
  const layouts = on.native.tiles4bit ? (['flat', 'tiled'] as const) : (['flat'] as const)

  describe.each(['nf4', 'fp4'] as const)('%s', (quantType) => {
    describe.each([false, true])('nested: %s', (nested) => {
      it.each(BLOCKSIZES)('blocks of %i', async (blocksize) => {
        const format = { quantType, blocksize, nested }
        await check(on, [1, 38, 192], format)
        await check(on, [4, 21, 320], format)
        await check(on, [12, 27, 576], format)
        await check(on, [1, 50, 100], format) // blocks straddle rows
        await check(on, [10, 26, 35], format) // rows begin within a byte
      })
    })
  })

  describe.each(FLOATS)('x %s', (dtype) => {
    it.each([1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 31, 33, 48, 64, 65, 100, 256, 257])('%i rows', async (m) => {
      await check(on, [m, 26, 320], {}, dtype)
      await check(on, [m, 25, 71], { nested: true }, dtype, true)
    })
  })

  it.each([
    [1, 1, 1],
    [2, 3, 1],
    [1, 1, 64],
    [3, 2, 4160],
    [8, 3, 4160],
    [1, 2, 12352],
    [5, 3, 4097],
    [40, 5, 4097],
  ] as const)('%i x %i x %i', async (...shape) => {
    await check(on, shape, { blocksize: 128 }, 'float32', true)
    await check(on, shape, { blocksize: 32, nested: true })
  })

  it('spreads a large weight over the threads', async () => {
    await check(on, [1, 2053, 320])
    await check(on, [2, 1031, 384], { nested: true })
    await check(on, [16, 1031, 192])
  })

  describe('tiled', () => {
    /** Row, byte of the row to place, from the description in kernels/formats.h. */
    const placeOf = (row: number, byte: number, k: number) => {
      const tile = Math.floor(row / 16) * (k / 64) + Math.floor(byte / 32)
      const [step, half, t] = [Math.floor((byte % 32) / 8), Math.floor((byte % 8) / 4), byte % 4]
      const lane = 4 * (row % 8) + t
      return tile * 512 + lane * 16 + 4 * step + 2 * half + Math.floor((row % 16) / 8)
    }

    it.each([
      [16, 64, false],
      [48, 192, true],
      [80, 320, false],
    ] as const)('re-orders %i x %i, nested: %s, and back', async (n, k, nested) => {
      const { weight } = randomPacked(n, k, on, { nested })
      const tiled = ops.tile4(weight, 'tiled')
      const [from, to] = [await weight.codes.data(), await tiled.codes.data()] as Uint8Array[]
      const [absmax, moved] = [await weight.absmax.data(), await tiled.absmax.data()] as Uint8Array[]
      for (let row = 0; row < n; ++row) {
        for (let byte = 0; byte < k / 2; ++byte)
          if (to![placeOf(row, byte, k)] !== from![(row * k) / 2 + byte]) throw new Error(`${row}, ${byte}`)
        for (let b = 0; b < k / 64; ++b) {
          const at = (Math.floor(row / 16) * (k / 64) + b) * 16 + 2 * (row % 8) + Math.floor((row % 16) / 8)
          if (moved![at] !== absmax![(row * k) / 64 + b]) throw new Error(`block ${row}, ${b}`)
        }
      }
      const back = ops.tile4({ ...weight, ...tiled, layout: 'tiled' }, 'flat')
      expect(await back.codes.data()).toEqual(from)
      expect(await back.absmax.data()).toEqual(absmax)
    })

    it('is refused where it cannot be', () => {
      const { weight } = randomPacked(24, 64, on, {})
      expect(thrown(() => ops.tile4(weight, 'tiled')).message).toMatch(/tiled.*\[24, 64\]/)
      const wide = randomPacked(16, 128, on, { blocksize: 128 }).weight
      expect(
        thrown(() => ops.linear4bit(Tensor.empty([1, 128], 'float32', on), { ...wide, layout: 'tiled' }))
          .code,
      ).toBe('ERR_HALFBYTE_VALUE')
    })

    if (!on.native.tiles4bit) {
      it('is refused by products of a device that does not want it', async () => {
        const { weight } = randomPacked(16, 64, on, {})
        const y = ops.linear4bit(Tensor.empty([1, 64], 'float32', on), {
          ...weight,
          ...ops.tile4(weight, 'tiled'),
          layout: 'tiled',
        })
        await expect(y.data()).rejects.toMatchObject({ code: 'ERR_HALFBYTE_UNSUPPORTED' })
      })
      return
    }

    const checkTiled = async (
      [m, n, k]: readonly [number, number, number],
      format: Format,
      dtype: FloatDType,
      extras = true,
    ): Promise<void> => {
      const { weight, values } = randomPacked(n, k, on, format)
      const tiled = { ...weight, ...ops.tile4(weight, 'tiled'), layout: 'tiled' as const }
      const x = randomOperand([m, k], dtype, on, m)
      const bias = extras ? randomOperand([n], 'float32', on, 2) : undefined
      const residual = extras ? randomOperand([m, n], dtype, on, 3) : undefined
      const y = ops.linear4bit(x.tensor, tiled, { bias: bias?.tensor, residual: residual?.tensor })
      await expectProduct(y, x.values, values, k, bias?.values, residual?.values)
    }

    it.each(['nf4', 'fp4'] as const)('has the values of %s', async (quantType) => {
      // the second has more tiles across than are moved at a time
      for (const [n, k, nested] of [
        [48, 320, false],
        [48, 320, true],
        [32, 64 * 67, false],
        [32, 64 * 67, true],
      ] as const) {
        const { weight } = randomPacked(n, k, on, { quantType, nested })
        const tiled = { ...weight, ...ops.tile4(weight, 'tiled'), layout: 'tiled' as const }
        for (const dtype of FLOATS) {
          const expected = await ops.dequantizeBlocks4(weight, dtype).data()
          expect(await ops.dequantizeBlocks4(tiled, dtype).data()).toEqual(expected)
        }
      }
    })

    describe.each(FLOATS)('x %s', (dtype) => {
      it.each([1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 128, 129, 200, 257])(
        '%i rows',
        async (m) => {
          await checkTiled([m, 48, 320], {}, dtype)
          await checkTiled([m, 80, 704], { quantType: 'fp4', nested: true }, dtype)
        },
      )

      it.each([
        [1, 16, 64],
        [1, 4096, 64],
        [3, 16, 8256],
        [8, 32, 28672],
        [6, 32, 8256],
        [9, 3328, 3136],
        [4, 32, 14400],
        [12, 144, 1088],
        [40, 32, 4096],
        [96, 176, 2112],
        [300, 272, 576],
        [1025, 32, 192],
        [40, 17536, 64],
        [1100, 4352, 64],
      ] as const)(
        '%i x %i x %i',
        async (...shape) => {
          await checkTiled(shape, {}, dtype)
          await checkTiled(shape, { nested: true }, dtype)
        },
        60_000,
      )

      it.each([
        [100, 48, 320],
        [257, 80, 704],
        ...(dtype === 'float32'
          ? []
          : ([
              [513, 6160, 64],
              [2100, 4352, 64],
            ] as const)), // whole rounds of items
      ] as const)(
        '%i x %i x %i, no bias and no residual',
        async (...shape) => {
          await checkTiled(shape, {}, dtype, false)
          await checkTiled(shape, { nested: true }, dtype, false)
        },
        60_000,
      )
    })
  })

  describe('of one x with several weights', () => {
    describe.each(layouts)('%s', (layout) => {
      /** Formats of weight i of a group: of one kind, as a model has them and kernels take together, or in turn. */
      const formats: Record<string, (i: number) => Format> = {
        plain: () => ({}),
        fp4: () => ({ quantType: 'fp4' }),
        nested: () => ({ nested: true }),
        'nested, of several maps': (i) => ({ nested: true, mapScale: 1 - i / 4 }),
        mixed: (i) => ({ nested: i % 2 === 1, quantType: i === 2 ? 'fp4' : 'nf4' }),
      }
      const kinds = Object.keys(formats)

      /** Weights of one K, with and without a bias. */
      const operands = (ns: readonly number[], k: number, kind: string) =>
        ns.map((n, i) => {
          const made = randomPacked(n, k, on, formats[kind]!(i))
          const weight = { ...made.weight, ...ops.tile4(made.weight, layout), layout }
          return { ...made, weight, bias: i === 1 ? undefined : randomOperand([n], 'float32', on, n + i) }
        })

      const groups = [
        [1, [48, 16, 16], 320],
        [2, [64, 32], 192],
        [3, [32, 48], 640],
        [4, [16, 16, 16], 8256],
        [5, [16], 128],
        [8, [80, 16, 32], 1088],
        [17, [32, 16, 16], 256],
      ] as const
      it.each(kinds.flatMap((kind) => groups.map(([m, ns, k]) => [kind, m, ns, k] as const)))(
        '%s: %i rows, %j x %i',
        async (kind, m, ns, k) => {
          for (const dtype of FLOATS) {
            const x = randomOperand([m, k], dtype, on, m)
            const weights = operands(ns, k, kind)
            const results = ops.linear4bitGroup(
              x.tensor,
              weights.map(({ weight }) => weight),
              weights.map(({ bias }) => bias?.tensor),
            )
            expect(results.map(({ shape }) => shape)).toEqual(ns.map((n) => [m, n]))
            for (const [i, y] of results.entries())
              await expectProduct(y, x.values, weights[i]!.values, k, weights[i]!.bias?.values)
          }
        },
      )

      const pairs = [
        [1, 48, 320],
        [3, 16, 64],
        [4, 32, 8256],
        [8, 160, 704],
        [20, 32, 192],
      ] as const
      it.each(kinds.flatMap((kind) => pairs.map(([m, n, k]) => [kind, m, n, k] as const)))(
        'gated, %s: %i x %i x %i',
        async (kind, m, n, k) => {
          const [gate, up] = operands([n, n], k, kind)
          const bias = gate!.bias!.tensor
          for (const dtype of FLOATS) {
            const x = randomOperand([m, k], dtype, on, m)
            const wide = x.tensor.to('float32')
            for (const act of ['silu', 'gelu', 'gelu_tanh', 'relu', 'sigmoid'] as const) {
              // of either half, never of both, so that one in the place of the other shows
              const biases = act === 'silu' || act === 'relu' ? [bias, undefined] : [undefined, bias]
              const y = ops.linear4bitGated(x.tensor, gate!.weight, up!.weight, act, biases)
              const apart = ops.gatedActivation(
                ops.linear4bit(wide, gate!.weight, { bias: biases[0] }),
                ops.linear4bit(wide, up!.weight, { bias: biases[1] }),
                act,
              )
              const tolerance = { float32: 1e-6, float16: 1.5e-3, bfloat16: 1.2e-2 }[dtype]
              expect(relativeError(await y.floats(), await apart.floats())).toBeLessThan(tolerance)
            }
          }
        },
      )
    })

    it('gives no rows for no rows', async () => {
      const weights = [randomPacked(16, 64, on, {}).weight, randomPacked(16, 64, on, {}).weight] as const
      const x = Tensor.empty([0, 64], 'float16', on)
      for (const y of ops.linear4bitGroup(x, weights)) expect((await y.data()).length).toBe(0)
      expect((await ops.linear4bitGated(x, ...weights, 'silu').data()).length).toBe(0)
    })

    it('refuses weights that do not fit', () => {
      const [a, b] = [randomPacked(16, 64, on, {}).weight, randomPacked(16, 128, on, {}).weight]
      const x = Tensor.empty([1, 64], 'float32', on)
      expect(thrown(() => ops.linear4bitGroup(x, [a, b])).message).toMatch(/weight 1 \[16, 128\]/)
      expect(thrown(() => ops.linear4bitGroup(x, [])).message).toMatch(/0 weights/)
      expect(thrown(() => ops.linear4bitGroup(x, [a], [Tensor.empty([3], 'float32', on)])).message).toMatch(
        /bias/,
      )
      const narrow = randomPacked(8, 64, on, {}).weight
      expect(thrown(() => ops.linear4bitGated(x, a, narrow, 'silu')).message).toMatch(/gate has 16.*up 8/)
    })
  })

  describe.each(layouts)('of a weight in the %s layout', (layout) => {
    it.each([1, 16, 100])('without input features: %i rows of bias and residual', async (m) => {
      const n = 4096
      for (const nested of [false, true]) {
        const weight = { ...randomPacked(n, 0, on, { nested }).weight, layout }
        for (const dtype of FLOATS) {
          const x = Tensor.empty([m, 0], dtype, on)
          const bias = randomOperand([n], 'float32', on, 2)
          const residual = randomOperand([m, n], dtype, on, 3)
          const y = ops.linear4bit(x, weight, { bias: bias.tensor, residual: residual.tensor })
          const expected = residual.values.map((value, i) => value + bias.values[i % n]!)
          const tolerance = { float32: 1e-6, float16: 5e-4, bfloat16: 4e-3 }[dtype]
          expect(relativeError(await y.floats(), expected)).toBeLessThan(tolerance)
          const [first, second] = ops.linear4bitGroup(x, [weight, weight], [bias.tensor])
          const rows = residual.values.map((_, i) => bias.values[i % n]!)
          expect(relativeError(await first!.floats(), rows)).toBeLessThan(tolerance)
          expect((await second!.floats()).every((value) => value === 0)).toBe(true)
          const gated = ops.linear4bitGated(x, weight, weight, 'silu')
          expect((await gated.floats()).every((value) => value === 0)).toBe(true)
        }
      }
    })

    it('gives nothing for no rows and without output features', async () => {
      for (const dtype of FLOATS) {
        for (const [m, n] of [
          [0, 32],
          [0, 4096],
          [1, 0],
          [16, 0],
          [100, 0],
        ] as const) {
          const weight = { ...randomPacked(n, 128, on, {}).weight, layout }
          const x = Tensor.zeros([m, 128], dtype, on)
          const results = [
            ops.linear4bit(x, weight),
            ...ops.linear4bitGroup(x, [weight, weight]),
            ops.linear4bitGated(x, weight, weight, 'silu'),
          ]
          for (const y of results) {
            expect(y.shape).toEqual([m, n])
            expect((await y.data()).length).toBe(0)
          }
        }
      }
    })
  })

  it('takes statistics that the op before it makes', async () => {
    const [n, k, inner] = [64, 1024, 256]
    const blocks = (n * k) / 64
    const layout = layouts.at(-1)!
    const { weight } = randomPacked(n, k, on, {})
    const packed = { ...weight, ...ops.tile4(weight, layout), layout }
    const x = randomOperand([1, k], 'bfloat16', on, 1).tensor
    const random = uniform(2)
    const wide = Tensor.from(
      Int8Array.from({ length: blocks * inner }, () => 255 * random() - 127),
      { shape: [blocks, inner], device: on },
    )
    const ones = Tensor.full([blocks], 1, 'float32', on)
    for (let i = 0; i < 20; i++) {
      const source = randomOperand([1, inner], 'float32', on, i).tensor
      const made = ops.linear8bit(source, wide, ones).reshape(-1)
      const four = ops.linear4bit(x, { ...packed, absmax: made })
      const scb = ops.linear8bit(source, wide, ones).reshape(-1)
      const eight = ops.linear8bit(source, wide, scb)
      await on.synchronize()
      const later = ops.linear4bit(x, { ...packed, absmax: made })
      expect(await four.data()).toEqual(await later.data())
      await on.synchronize()
      expect(await eight.data()).toEqual(await ops.linear8bit(source, wide, scb).data())
      expect((await eight.floats()).some((value) => value !== 0)).toBe(true)
    }
  })

  it('gives no rows for no rows', async () => {
    const { weight } = randomPacked(6, 64, on, {})
    const y = ops.linear4bit(Tensor.empty([2, 0, 64], 'float16', on), weight)
    expect(y.shape).toEqual([2, 0, 6])
    expect((await y.data()).length).toBe(0)
  })

  it('refuses operands that do not fit', () => {
    const { weight } = randomPacked(6, 64, on, {})
    const x = Tensor.empty([2, 64], 'float32', on)
    const refused = (change: object, input = x) => {
      const { code, message } = thrown(() => ops.linear4bit(input, { ...weight, ...change }))
      return `${code} ${message}`
    }
    expect(refused({}, Tensor.empty([2, 65], 'float32', on))).toMatch(/SHAPE.*\[2, 65\].*64 input features/)
    expect(refused({}, Tensor.empty([2, 64], 'uint8', on))).toMatch(/DTYPE.*x is uint8/)
    expect(refused({ n: 7 })).toMatch(/SHAPE.*codes.*\[7, 64\].*224 bytes/)
    expect(refused({ blocksize: 128 })).toMatch(/SHAPE.*absmax has 6 blocks.*has 3/)
    expect(refused({ blocksize: 48 })).toMatch(/VALUE.*blocksize 48/)
    expect(refused({ quantType: 'int4' })).toMatch(/VALUE.*"int4".*nf4/)
    expect(refused({ absmax: Tensor.empty([6], 'uint8', on) })).toMatch(/DTYPE.*absmax is uint8/)
    expect(refused({ nestedAbsmax: Tensor.empty([1], 'float32', on) })).toMatch(/DTYPE.*absmax is float32/)
  })

  it('refuses parts of a weight that are not contiguous, or of another dtype', async () => {
    const [n, k] = [32, 1024]
    const { weight } = randomPacked(n, k, on, { nested: true })
    const x = Tensor.zeros([1, k], 'float32', on)
    const ids = Tensor.from(Int32Array.of(1), { device: on })
    const calls = (packed: typeof weight) => [
      () => ops.linear4bit(x, packed),
      () => ops.linear4bitGroup(x, [weight, packed]),
      () => ops.linear4bitGated(x, weight, packed, 'silu'),
      () => ops.dequantizeBlocks4(packed, 'float32'),
      () => ops.gatherRows4(packed, ids, 'float32'),
    ]
    /** The same from the addon, past the checks of the library. */
    const refusedNatively = async (packed: typeof weight) => {
      const y = Tensor.empty([n, k], 'float32', on)
      const { codes, absmax, nestedAbsmax, nestedCode, offset } = packed
      const parts = [codes, absmax, nestedAbsmax!, nestedCode!, offset!].map(({ handle }) => handle)
      on.native.run(native.ops.indexOf('dequantize_4bit'), [y.handle], parts, [0, 64, n, k, 0])
      expect((await rejection(y.data())).code).toBe('ERR_HALFBYTE_SHAPE')
    }
    for (const part of ['codes', 'absmax', 'nestedAbsmax', 'nestedCode'] as const) {
      const packed = { ...weight, [part]: strided(weight[part]!) }
      for (const call of calls(packed)) {
        const { code, message } = thrown(call)
        expect(code).toBe('ERR_HALFBYTE_SHAPE')
        expect(message).toContain(`${part} [${weight[part]!.size}, 1] is not contiguous; call contiguous()`)
      }
      await refusedNatively(packed)
    }
    for (const part of ['nestedAbsmax', 'nestedCode', 'offset'] as const) {
      const packed = { ...weight, [part]: weight[part]!.to('float16') }
      for (const call of calls(packed)) {
        const { code, message } = thrown(call)
        expect(code).toBe('ERR_HALFBYTE_DTYPE')
        expect(message).toContain(`${part} is float16`)
      }
      await refusedNatively(packed)
    }
  })
})
