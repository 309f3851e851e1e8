import {
  device,
  devices,
  Embedding,
  Embedding4bit,
  Embedding8bit,
  Linear,
  Linear4bit,
  Linear8bit,
  LinearFP4,
  LinearNF4,
  ops,
  Tensor,
  type Device,
  type DType,
  type Module,
} from '../../lib/index.js'
import { readGolden, type Linear4Case } from '../support/golden.js'
import { allocatedMemory, baselineMemory } from '../support/memory.js'
import { product } from '../support/product.js'
import { noise, relativeError } from '../support/reference.js'

const LIMIT = { float32: 1e-5, float16: 2e-3, bfloat16: 1e-2 } as const
type Float = keyof typeof LIMIT

const golden = readGolden<Linear4Case>('linear4')

/** Rows of x, inputs and outputs. */
const SHAPES = [
  [1, 64, 1],
  [3, 100, 36],
  [17, 320, 65],
  [1, 33, 7],
] as const

const filler =
  (device: Device) =>
  (shape: number[], dtype: DType = 'float32', scale = 1) => {
    const values = noise(shape.reduce((a, b) => a * b, 1)).map((x) => scale * x)
    return Tensor.from(values, { shape, device }).to(dtype)
  }

describe.each(devices())('4-bit layers on %s', (on) => {
  const tensor = (name: string) => golden.tensor(name, on.name)
  const filled = filler(on)

  it("load bitsandbytes' state dicts and give its outputs", async () => {
    for (const c of golden.cases) {
      const prefix = `c${c.case}.state.`
      const state = new Map(golden.names(prefix).map((name) => [name, tensor(prefix + name)]))
      const layer = new Linear4bit(c.K, c.N, { bias: c.bias, device: 'meta', computeDtype: c.dtype })
      await layer.loadStateDict(state)
      expect([layer.quantType, layer.quantState!.blocksize, layer.quantState!.nested]).toEqual([
        c.quant_type,
        c.blocksize,
        c.nested,
      ])
      const x = tensor(`c${c.case}.x`)
      const y = layer.forward(x)
      expect(y.dtype).toBe(c.dtype)
      const exact = await tensor(`c${c.case}.y_exact`).floats()
      const theirs = await tensor(`c${c.case}.y`).floats()
      const ours = await y.floats()
      expect(relativeError(ours, exact)).toBeLessThan(LIMIT[c.dtype])
      expect(relativeError(ours, theirs)).toBeLessThan(2 * LIMIT[c.dtype])

      // and back: the same names and bytes
      const again = await layer.stateDict()
      expect([...again.keys()].sort()).toEqual([...state.keys()].sort())
      for (const [name, value] of again) {
        expect([name, value.dtype, value.shape]).toEqual([
          name,
          state.get(name)!.dtype,
          state.get(name)!.shape,
        ])
        expect([name, await value.data()]).toEqual([name, await state.get(name)!.data()])
      }
    }
  })

  it("quantise bitsandbytes' weights to its own bytes", async () => {
    for (const c of golden.cases) {
      const layer = new Linear4bit(c.K, c.N, {
        bias: false,
        device: 'meta',
        quantType: c.quant_type,
        blocksize: c.blocksize,
        compressStatistics: c.nested,
      })
      await layer.loadParameter('weight', tensor(`c${c.case}.w`))
      await layer.checkFinite()
      const state = await layer.stateDict()
      for (const name of ['weight', 'weight.absmax', 'weight.quant_map']) {
        const theirs = golden.data(`c${c.case}.state.${name}`)
        expect([c.case, name, [...(await state.get(name)!.data())]]).toEqual([c.case, name, [...theirs]])
      }
    }
  })

  const dtypes: Float[] = ['float32', 'float16', 'bfloat16']
  it.each(
    dtypes.flatMap((dtype) =>
      (['nf4', 'fp4'] as const).flatMap((quantType) =>
        [true, false].map((compressStatistics) => ({ dtype, quantType, compressStatistics })),
      ),
    ),
  )('multiply by the dequantised weight: %o', async ({ dtype, quantType, compressStatistics }) => {
    for (const [m, k, n] of SHAPES) {
      const dense = new Linear(k, n, { device: on, dtype })
      const layer = Linear4bit.fromLinear(dense, { quantType, compressStatistics })
      const x = filled([m, k], dtype)
      const y = layer.forward(x)
      expect([y.shape, y.dtype]).toEqual([[m, n], dtype])
      const weight = await layer.dequantizeWeight('float32').floats()
      const exact = product(await x.floats(), weight, k, await dense.bias!.value.floats())
      expect(relativeError(await y.floats(), exact)).toBeLessThan(LIMIT[dtype])
      const residual = filled([m, n], dtype, 3)
      const sum = await layer.forward(x, residual).floats()
      const wanted = (await residual.floats()).map((r, i) => r + exact[i]!)
      expect(relativeError(sum, wanted)).toBeLessThan(LIMIT[dtype])
    }
  })

  it('cast inputs to the compute dtype and results back', async () => {
    const dense = new Linear(64, 48, { device: on })
    const layer = LinearNF4.fromLinear(dense, { computeDtype: 'bfloat16' })
    const x = filled([4, 64])
    const y = layer.forward(x)
    expect(y.dtype).toBe('float32')
    const through = layer.forward(x.to('bfloat16')).to('float32')
    expect(await y.floats()).toEqual(await through.floats())
    const residual = filled([4, 48])
    const sum = await layer.forward(x, residual).floats()
    expect(sum).toEqual(await ops.add(y, residual).floats())
  })

  it('take the dtype of the first float32 or bfloat16 input where no compute dtype is set', () => {
    const layer = new LinearFP4(64, 8, { device: on, bias: false })
    expect(layer.quantType).toBe('fp4')
    layer.forward(filled([1, 64], 'float16'))
    expect(layer.computeDtype).toBeNull()
    layer.forward(filled([1, 64], 'bfloat16'))
    expect(layer.computeDtype).toBe('bfloat16')
    layer.forward(filled([1, 64]))
    expect(layer.computeDtype).toBe('bfloat16')
  })

  it('take no rows, and more than two dimensions', async () => {
    const layer = new LinearNF4(64, 8, { device: on })
    expect(layer.forward(Tensor.zeros([0, 64], 'float32', on)).shape).toEqual([0, 8])
    const x = filled([2, 3, 64])
    const y = layer.forward(x)
    expect(y.shape).toEqual([2, 3, 8])
    expect(await y.floats()).toEqual(await layer.forward(x.reshape(6, 64)).floats())
  })

  it.each(['uint8', 'int8', 'float16', 'bfloat16', 'float32'] as const)(
    'round-trip through a state dict with codes stored as %s',
    async (quantStorage) => {
      const layer = new LinearNF4(64, 12, { device: on, quantStorage, blocksize: 32 })
      const state = await layer.stateDict()
      const bytes = { uint8: 1, int8: 1, float16: 2, bfloat16: 2, float32: 4 }[quantStorage]
      expect([state.get('weight')!.dtype, state.get('weight')!.shape]).toEqual([
        quantStorage,
        [384 / bytes, 1],
      ])
      const other = new Linear4bit(64, 12, { device: 'meta' })
      for (const [name, value] of [...state].reverse()) await other.loadParameter(name, value.share())
      expect(other.missingParameters()).toEqual([])
      expect(other.quantType).toBe('nf4')
      const x = filled([3, 64])
      expect(await other.forward(x).floats()).toEqual(await layer.forward(x).floats())
    },
  )

  it('say which parts are missing, unknown or wrong', async () => {
    const layer = new LinearNF4(64, 12, { device: on, bias: false })
    const other = new Linear4bit(64, 12, { device: 'meta', bias: false, quantType: 'nf4' })
    expect(other.missingParameters()).toEqual(['weight'])
    const state = await layer.stateDict()
    state.delete('weight.nested_absmax')
    await expect(other.loadStateDict(state)).rejects.toThrow(/weight\.nested_absmax is missing/)
    await other.loadParameter('weight', state.get('weight')!.share())
    await other.loadParameter('weight.absmax', state.get('weight.absmax')!.share())
    expect(other.missingParameters()).toEqual([
      'weight.quant_map',
      'weight.nested_absmax',
      'weight.nested_quant_map',
      'weight.quant_state.bitsandbytes__nf4',
    ])
    expect(() => other.forward(filled([1, 64]))).toThrow(/used before it is loaded/)
    await expect(other.loadParameter('weight.scales', Tensor.zeros([1]))).rejects.toThrow(
      /no 'weight\.scales'/,
    )
    const full = await layer.stateDict()
    full.set('weight', Tensor.zeros([7, 1], 'uint8', on))
    await expect(other.loadStateDict(full)).rejects.toThrow(
      /weight is uint8 \[7, 1\]; the model takes float \[12, 64\]/,
    )
    const wrong = await new LinearNF4(12, 64, { device: on, bias: false }).stateDict()
    await expect(other.loadStateDict(wrong)).rejects.toThrow(/quant_state says shape \[64, 12\].*\[12, 64\]/)
    const json = await layer.stateDict()
    json.set('weight.quant_state.bitsandbytes__nf4', Tensor.from(Uint8Array.of(1, 2), { device: on }))
    await expect(other.loadStateDict(json)).rejects.toMatchObject({ code: 'ERR_HALFBYTE_STATE_DICT' })
  })

  it('find NaN in the statistics of a weight that is quantised already', async () => {
    const state = await new LinearNF4(64, 12, {
      device: on,
      bias: false,
      compressStatistics: false,
    }).stateDict()
    state.set('weight.absmax', Tensor.full([12], NaN, 'float32', on))
    const layer = new Linear4bit(64, 12, { device: 'meta', bias: false })
    await layer.loadStateDict(state)
    await expect(layer.checkFinite()).rejects.toThrow(/NaN or infinity in the weights of Linear4bit \(12\)/)
    expect(() => layer.forward(filled([1, 64]))).toThrow(/NaN or infinite/)
  })

  it('move to another device and stay what they are', async () => {
    const layer = new LinearNF4(64, 12, { device: on })
    const x = filled([2, 64])
    const y = await layer.forward(x).floats()
    layer.to('cpu:1')
    expect(layer.weight.value.device).toBe(device('cpu:1'))
    expect([...layer.ownStatistics()].every(([, t]) => t.device === device('cpu:1'))).toBe(true)
    const moved = await layer.forward(x.to('cpu:1')).floats()
    // another kind of device adds in another order
    expect(relativeError(moved, y)).toBeLessThanOrEqual(on.type === 'cpu' ? 0 : 1e-6)
  })

  it.each([
    { bits: 4, kind: Linear4bit },
    { bits: 8, kind: Linear8bit },
  ])('free what $bits bits made of a weight that is refused', async ({ kind }) => {
    const dense = new Linear(1024, 1024, { device: on })
    dense.weight.value.write(new Float32Array(1024 * 1024).fill(NaN))
    const before = await baselineMemory(on)
    await expect(kind.quantize(dense)).rejects.toThrow(/NaN or infinity/)
    // codes alone are half a megabyte, the statistics sixteen kilobytes
    expect(await allocatedMemory(on)).toBeLessThan(before + 8_000)
    dense.dispose()
  })

  it('free everything', () => {
    const layer = new LinearNF4(64, 12, { device: on })
    const tensors = [layer.weight.value, layer.bias!.value, ...[...layer.ownStatistics()].map(([, t]) => t)]
    expect(tensors.length).toBe(7)
    layer.dispose()
    expect(tensors.every((t) => t.disposed)).toBe(true)
    expect(() => layer.forward(filled([1, 64]))).toThrow(/used after its model was disposed/)
  })
})

describe.each(devices())('8-bit layers on %s', (on) => {
  const filled = filler(on)

  it.each(['float32', 'float16', 'bfloat16'] as const)('multiply as LLM.int8() does, %s', async (dtype) => {
    for (const [m, k, n] of SHAPES) {
      const dense = new Linear(k, n, { device: on, dtype })
      const layer = Linear8bit.fromLinear(dense)
      const x = filled([m, k], dtype)
      const y = layer.forward(x)
      expect([y.shape, y.dtype]).toEqual([[m, n], dtype])
      // the exact product of the quantised rows
      const rows = ops.int8QuantizeRows(x)
      const left = await ops.int8DequantizeRows(rows.codes, rows.rowAbsmax, 'float32').floats()
      const right = await layer.dequantizeWeight('float32').floats()
      const exact = product(left, right, k, await dense.bias!.value.floats())
      expect(relativeError(await y.floats(), exact)).toBeLessThan(dtype === 'float32' ? 2e-5 : LIMIT[dtype])
      const dense64 = product(
        await x.floats(),
        await dense.weight.value.floats(),
        k,
        await dense.bias!.value.floats(),
      )
      if (m > 1) expect(relativeError(await y.floats(), dense64)).toBeLessThan(0.03)
    }
  })

  it('keep outlier columns in the precision of the input', async () => {
    const dense = new Linear(128, 32, { device: on, bias: false })
    const values = noise(4 * 128).map((x) => x / 2)
    for (let row = 0; row < 4; row++) values[row * 128 + 17] = 60
    const x = Tensor.from(values, { shape: [4, 128], device: on })
    const exact = await dense.forward(x).floats()
    const error = async (threshold: number) =>
      relativeError(await Linear8bit.fromLinear(dense, { threshold }).forward(x).floats(), exact)
    expect(await error(6)).toBeLessThan((await error(0)) / 3)
  })

  it('round-trip through a state dict', async () => {
    const layer = Linear8bit.fromLinear(new Linear(64, 12, { device: on }))
    const state = await layer.stateDict()
    expect([...state].map(([name, t]) => [name, t.dtype, t.shape])).toEqual([
      ['weight', 'int8', [12, 64]],
      ['bias', 'float32', [12]],
      ['SCB', 'float32', [12]],
      ['weight_format', 'uint8', []],
    ])
    const other = new Linear8bit(64, 12, { device: 'meta' })
    await other.loadParameter('weight', state.get('weight')!.share())
    expect(other.missingParameters()).toEqual(['SCB', 'bias'])
    await other.loadParameter('SCB', state.get('SCB')!.share())
    await other.loadParameter('bias', state.get('bias')!.share())
    await other.loadParameter('weight_format', state.get('weight_format')!.share())
    const x = filled([3, 64])
    expect(await other.forward(x).floats()).toEqual(await layer.forward(x).floats())
    await new Linear8bit(64, 12, { device: 'meta' }).loadStateDict(state)
  })

  it.each([
    [12, 1],
    [1, 12],
  ])('take an SCB of shape [%d, %d]', async (...shape) => {
    const layer = Linear8bit.fromLinear(new Linear(64, 12, { device: on }))
    const state = await layer.stateDict()
    state.set('SCB', state.get('SCB')!.reshape(...shape))
    const other = new Linear8bit(64, 12, { device: 'meta' })
    await other.loadStateDict(state)
    const x = filled([3, 64])
    expect(await other.forward(x).floats()).toEqual(await layer.forward(x).floats())
  })

  it('refuse layouts of old GPUs and parts that do not fit', async () => {
    const layer = new Linear8bit(64, 12, { device: 'meta', bias: false })
    const ampere = Tensor.from(Uint8Array.of(3), { shape: [], device: on })
    await expect(layer.loadParameter('weight_format', ampere)).rejects.toThrow(
      /weight_format 3 is a layout of old GPUs/,
    )
    await expect(layer.loadParameter('SCB', Tensor.zeros([11], 'float32', on))).rejects.toThrow(
      /it must be float32 \[12\]/,
    )
    await expect(layer.loadParameter('weight', Tensor.zeros([12, 63], 'int8', on))).rejects.toThrow(
      /\[12, 64\]/,
    )
    await expect(
      layer.loadStateDict(new Map([['weight', Tensor.zeros([12, 64], 'int8', on)]])),
    ).rejects.toThrow(/SCB is missing/)
  })

  it('hasFp16Weights keeps the weight and quantises it in each forward', async () => {
    const dense = new Linear(64, 12, { device: on, dtype: 'float16' })
    const kept = Linear8bit.fromLinear(dense, { hasFp16Weights: true })
    const packed = Linear8bit.fromLinear(dense)
    const x = filled([5, 64], 'float16')
    expect(await kept.forward(x).floats()).toEqual(await packed.forward(x).floats())
    expect(kept.weight.nbytes).toBe(64 * 12 * 2)
    expect([...(await kept.stateDict()).keys()]).toEqual(['weight', 'bias'])
    expect(await kept.dequantizeWeight().floats()).toEqual(await dense.weight.value.floats())
    expect(kept.to('float32').weight.value.dtype).toBe('float32')
    expect(() => packed.to('float32')).toThrow(/cannot be cast.*int8 weight/)
  })

  it('is float16 throughout with bnbExact', async () => {
    const dense = new Linear(64, 12, { device: on })
    const x = filled([5, 64])
    const exact = await Linear8bit.fromLinear(dense, { bnbExact: true }).forward(x).floats()
    const rounded = await Tensor.from(exact, { device: on }).to('float16').floats()
    expect(exact).toEqual(rounded)
    const plain = await Linear8bit.fromLinear(dense).forward(x).floats()
    expect(relativeError(exact, plain)).toBeLessThan(5e-3)
    expect(exact).not.toEqual(plain)
  })

  it('move to another device', async () => {
    const layer = new Linear8bit(64, 12, { device: on, threshold: 6 })
    const x = filled([2, 64])
    const y = await layer.forward(x).floats()
    layer.to({ device: 'cpu:1' })
    expect(layer.scb!.device).toBe(device('cpu:1'))
    const moved = await layer.forward(x.to('cpu:1')).floats()
    // another kind of device adds in another order
    expect(relativeError(moved, y)).toBeLessThanOrEqual(on.type === 'cpu' ? 0 : 1e-6)
    layer.dispose()
    expect(layer.scb).toBeUndefined()
  })
})

describe.each(devices())('embeddings in few bits on %s', (on) => {
  const make: [string, (table: Embedding) => Module & { dequantizeWeight(dtype?: DType): Tensor }][] = [
    ['Embedding4bit nf4', (table) => Embedding4bit.fromEmbedding(table, { quantType: 'nf4' })],
    ['Embedding4bit fp4 plain', (table) => Embedding4bit.fromEmbedding(table, { compressStatistics: false })],
    ['Embedding8bit', (table) => Embedding8bit.fromEmbedding(table)],
  ]
  it.each(make)('%s gives the rows of the dequantised table', async (_, quantise) => {
    for (const dtype of ['float32', 'float16', 'bfloat16'] as const) {
      for (const width of [64, 40]) {
        const table = new Embedding(11, width, { device: on, dtype })
        const layer = quantise(table) as Embedding4bit | Embedding8bit
        await layer.checkFinite()
        const ids = Tensor.from(Int32Array.of(3, 0, 10, 3), { shape: [2, 2], device: on })
        const rows = layer.forward(ids)
        expect([rows.shape, rows.dtype]).toEqual([[2, 2, width], dtype])
        const wanted = ops.gatherRows(layer.dequantizeWeight(), ids)
        expect(await rows.floats()).toEqual(await wanted.floats())
        const state = await layer.stateDict()
        const Kind = layer.constructor as new (v: number, d: number, o: object) => Embedding4bit
        const other = new Kind(11, width, { device: 'meta', dtype })
        await other.loadStateDict(state)
        expect(await other.forward(ids).floats()).toEqual(await rows.floats())
        expect(() => layer.to('float16')).toThrow(/cannot be cast/)
      }
    }
  })
})
