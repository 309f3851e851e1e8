/** The ops that `bench ops` measures, one call each, on operands of a given size. */
import { ops, Tensor, tidy, type Device, type DType } from 'halfbyte'
import { native } from 'halfbyte/internal/native.js'
import { normalTensor } from './random.js'

/** How large the operands are. */
export interface Sizes {
  /** Rows of activations, and of the result of a gather. */
  rows: number
  /** Length of a row: the hidden size of a model. */
  hidden: number
  /** Its gated MLP, and the rows that go through it. */
  inner: number
  innerRows: number
  /** Rows of a weight of `hidden` columns. */
  weightRows: number
  vocabulary: number
  /** Rows of logits. */
  sequences: number
  /** Rows of an embedding table. */
  tableRows: number
}

/** Of an 8-billion-parameter Llama at a step of 64 tokens: what a CPU gets through in a moment. */
export const SMALL: Sizes = {
  rows: 64,
  hidden: 4096,
  inner: 14336,
  innerRows: 64,
  weightRows: 4096,
  vocabulary: 128256,
  sequences: 1,
  tableRows: 16032,
}

/** The same model on a GPU: operands of 64 MB and more, in 16 bits as well. */
export const LARGE: Sizes = {
  rows: 16384,
  hidden: 4096,
  inner: 14336,
  innerRows: 4096,
  weightRows: 28672,
  vocabulary: 128256,
  sequences: 512,
  tableRows: 32064,
}

export type Results = readonly Tensor[]

export interface OpCase {
  op: string
  dtype: DType
  shape: string
  /** One set of operands, each contiguous and owned by the set. */
  operands: () => Tensor[]
  /** Queues the op on a set. */
  call: (operands: Tensor[]) => Results
  /** Bytes read and written; where it is not said, those of the operands and the results. */
  bytes?: number
}

/** Heads of 128 out of a row of activations. */
const HEAD = 128
const BLOCK = 64

/** The cases of one float dtype. Operands are made when they are asked for. */
export function opCases(device: Device, dtype: DType, sizes: Sizes): OpCase[] {
  const { rows, hidden, inner, innerRows, weightRows, vocabulary, sequences, tableRows } = sizes
  const size = dtype === 'float32' ? 4 : 2
  const random = (shape: readonly number[], scale = 1, seed = 1, as: DType = dtype): Tensor => {
    const wide = normalTensor(shape, scale, device, seed)
    if (as === 'float32') return wide
    using narrow = wide
    return narrow.to(as)
  }
  const integers = (count: number, below: number): Tensor =>
    Tensor.from(
      Int32Array.from({ length: count }, (_, i) => (i * 7919) % below),
      { device },
    )
  const repeated = (row: readonly number[]): Tensor =>
    Tensor.from(
      Float32Array.from({ length: sequences * row.length }, (_, i) => row[i % row.length]!),
      { shape: [sequences, row.length], device },
    )
  const x = (seed = 1) => random([rows, hidden], 1, seed)
  const weight = (seed = 1) => random([weightRows, hidden], 0.02, seed)
  const codesAndAbsmax = (of: Tensor): Tensor[] => {
    using values = of
    const { codes, absmax } = ops.quantizeBlocks4(values, 'nf4', BLOCK)
    return [codes, absmax]
  }
  const nested = (of: Tensor): Tensor[] => {
    const [codes, absmax] = codesAndAbsmax(of) as [Tensor, Tensor]
    return [
      codes,
      ...tidy(() => {
        const offset = ops.mean(absmax)
        const code = map()
        const parts = ops.quantizeBlocks8(ops.sub(absmax, offset), code, 256)
        absmax.dispose()
        return [parts.codes, parts.absmax, code, offset]
      }),
    ]
  }
  const map = () => Tensor.from(native.codebook('dynamic'), { device })
  const packed = (n: number, [codes, absmax, nestedAbsmax, nestedCode, offset]: Tensor[]): ops.Packed4 => ({
    codes: codes!,
    absmax: absmax!,
    nestedAbsmax,
    nestedCode,
    offset,
    quantType: 'nf4',
    blocksize: BLOCK,
    n,
    k: hidden,
  })
  const tiled = (set: Tensor[]): Tensor[] => {
    const { codes, absmax } = ops.tile4(packed(weightRows, set), 'tiled')
    set.slice(0, 2).forEach((flat) => flat.dispose())
    return [codes, absmax, ...set.slice(2)]
  }
  const matrix = `${rows} x ${hidden}`
  const square = `${weightRows} x ${hidden}`
  const logits = `${sequences} x ${vocabulary}`
  const heads = hidden / HEAD
  const all: Omit<OpCase, 'dtype'>[] = []
  const add = (
    op: string,
    shape: string,
    operands: () => Tensor[],
    call: (set: Tensor[]) => Tensor | Results,
    bytes?: number,
  ) => {
    const results = (set: Tensor[]): Results => {
      const made = call(set)
      return made instanceof Tensor ? [made] : made
    }
    all.push({ op, shape, operands, call: results, ...(bytes !== undefined && { bytes }) })
  }

  add(
    'add',
    matrix,
    () => [x(), x(2)],
    ([a, b]) => ops.add(a!, b!),
  )
  add(
    'mul by a row',
    matrix,
    () => [x(), random([hidden])],
    ([a, b]) => ops.mul(a!, b!),
  )
  add(
    'mul by a column',
    matrix,
    () => [x(), random([rows, 1])],
    ([a, b]) => ops.mul(a!, b!),
  )
  add(
    'silu',
    matrix,
    () => [x()],
    ([a]) => ops.activation(a!, 'silu'),
  )
  add(
    'gelu',
    matrix,
    () => [x()],
    ([a]) => ops.activation(a!, 'gelu'),
  )
  add(
    'gelu_tanh',
    matrix,
    () => [x()],
    ([a]) => ops.activation(a!, 'gelu_tanh'),
  )
  add(
    'gatedActivation',
    `${innerRows} x ${inner}`,
    () => [random([innerRows, inner]), random([innerRows, inner], 1, 2)],
    ([gate, up]) => ops.gatedActivation(gate!, up!, 'silu'),
  )
  const other: DType = dtype === 'float16' ? 'float32' : 'float16'
  add(
    `to ${other}`,
    square,
    () => [weight()],
    ([w]) => w!.to(other),
  )
  add(
    'to int32',
    matrix,
    () => [x()],
    ([a]) => a!.to('int32'),
  )
  add(
    'fill',
    matrix,
    () => [x()],
    ([a]) => ops.fillInto(a!, 1).share(),
    rows * hidden * size,
  )
  add(
    'copy',
    matrix,
    () => [x()],
    ([a]) => a!.clone(),
  )
  const strided = (view: (whole: Tensor) => Tensor) => (set: Tensor[]) => {
    using seen = view(set[0]!)
    return seen.clone()
  }
  const moved = 2 * rows * hidden * size
  add(
    'copy of columns',
    matrix,
    () => [random([rows, 2 * hidden])],
    strided((a) => a.slice(1, 0, hidden)),
    moved,
  )
  add(
    'copy of a transpose',
    matrix,
    () => [x()],
    strided((a) => a.transpose(0, 1)),
  )
  add(
    'copy of heads',
    matrix,
    () => [random([rows, heads, HEAD])],
    strided((a) => a.permute(1, 0, 2)),
  )
  const ids = () => integers(rows, tableRows)
  const table = () => random([tableRows, hidden], 0.02)
  const gathered = rows * hidden
  add(
    'gatherRows',
    matrix,
    () => [table(), ids()],
    ([t, i]) => ops.gatherRows(t!, i!),
    moved,
  )
  add(
    'gatherRows4',
    matrix,
    () => [...codesAndAbsmax(table()), ids()],
    ([c, a, i]) => ops.gatherRows4(packed(tableRows, [c!, a!]), i!, dtype),
    gathered * (size + 0.5 + 4 / BLOCK),
  )
  add(
    'gatherRows8',
    matrix,
    () => {
      using values = table()
      const { codes, rowAbsmax } = ops.int8QuantizeRows(values)
      return [codes, rowAbsmax, ids()]
    },
    ([c, s, i]) => ops.gatherRows8(c!, s!, i!, dtype),
    gathered * (size + 1),
  )
  add(
    'routeTokens, 8 of 128',
    `${rows} x 128`,
    () => [random([rows, 128], 1, 1, 'float32')],
    ([scores]) => Object.values(ops.routeTokens(scores!, { perToken: 8, softmax: true, normalize: true })),
  )
  add(
    'weightedSum of 8',
    matrix,
    () => [x(), random([rows / 8, 8], 1, 2, 'float32')],
    ([results, shares]) => ops.weightedSum(results!, shares!),
  )
  const [experts, chosen, expertRows] = [16, 8, Math.min(weightRows / 4, 4096)]
  const weightsOf = (set: Tensor[]) =>
    ops.expertWeights(
      Array.from({ length: experts }, (_, e) => ({
        kind: '4bit',
        weight: {
          ...packed(expertRows, set.slice(2 * e, 2 * e + 2)),
          layout: ops.bestLayout4(device, expertRows, hidden, BLOCK),
        },
      })),
    )!
  const expertSet = () => [
    random([1, hidden]),
    integers(chosen, experts).reshape(1, chosen),
    ...Array.from({ length: experts }, (_, e) => {
      const [codes, absmax] = codesAndAbsmax(random([expertRows, hidden], 0.02, e)) as [Tensor, Tensor]
      const flat = packed(expertRows, [codes, absmax])
      const parts = ops.tile4(flat, ops.bestLayout4(device, expertRows, hidden, BLOCK))
      codes.dispose()
      absmax.dispose()
      return [parts.codes, parts.absmax]
    }).flat(),
  ]
  if (device.type === 'cpu' || dtype !== 'float32') {
    add(
      'linearExperts, nf4',
      `1 x ${hidden} to ${chosen} of ${experts} x ${expertRows}`,
      expertSet,
      ([a, i, ...set]) => ops.linearExperts(a!, i!, weightsOf(set)),
      chosen * expertRows * hidden * (0.5 + 4 / BLOCK),
    )
  }
  const norm = () => random([hidden], 1, 3)
  add(
    'rmsNorm',
    matrix,
    () => [x(), norm()],
    ([a, w]) => ops.rmsNorm(a!, w, 1e-5),
  )
  add(
    'rmsNorm, residual',
    matrix,
    () => [x(), norm(), x(2)],
    ([a, w, r]) => {
      const { y, sum } = ops.rmsNorm(a!, w, 1e-5, 0, r!)
      return [y, sum]
    },
  )
  add(
    'layerNorm',
    matrix,
    () => [x(), norm(), norm()],
    ([a, w, b]) => ops.layerNorm(a!, w, b, 1e-5),
  )
  const turned = () => [
    random([rows, heads, HEAD]),
    ...[4, 5].map((seed) => random([8192, HEAD / 2], 1, seed, 'float32')),
    integers(rows, 8192),
  ]
  for (const interleaved of [false, true]) {
    add(
      interleaved ? 'rope, interleaved' : 'rope',
      `${rows} x ${heads} x ${HEAD}`,
      turned,
      ([a, cos, sin, positions]) => ops.rope(a!, cos!, sin!, positions!, interleaved),
      moved,
    )
  }
  add(
    'argmax',
    logits,
    () => [random([sequences, vocabulary])],
    ([l]) => ops.argmax(l!),
  )
  add(
    'crossEntropy',
    logits,
    () => [random([sequences, vocabulary]), integers(sequences, vocabulary)],
    ([l, t]) => ops.crossEntropy(l!, t!),
  )
  const samplers: [string, number[]][] = [
    ['sample, greedy', [0, 0, 1, 0, 1]],
    ['sample', [1, 0, 1, 0, 1]],
    ['sample, temperature', [0.7, 0, 1, 0, 1]],
    ['sample, top-p', [1, 0, 0.9, 0, 1]],
    ['sample, top-k, top-p', [1, 50, 0.9, 0, 1]],
  ]
  for (const [name, row] of samplers) {
    add(
      name,
      logits,
      () => [
        random([sequences, vocabulary], 3),
        repeated(row),
        Tensor.zeros([sequences, 2], 'int64', device),
      ],
      ([l, params, rng]) => ops.sample(l!, { params: params!, rng: rng! }),
    )
  }
  if (dtype === 'float32')
    add(
      'mean',
      square,
      () => [weight()],
      ([w]) => ops.mean(w!),
    )
  add(
    'countNonfinite',
    square,
    () => [weight()],
    ([w]) => ops.countNonfinite(w!),
  )

  for (const [type, blocksize] of [
    ['nf4', 64],
    ['nf4', 4096],
    ['fp4', 64],
  ] as const) {
    const name = `quantizeBlocks4 ${type}, ${blocksize}`
    add(
      name,
      square,
      () => [weight()],
      ([w]) => Object.values(ops.quantizeBlocks4(w!, type, blocksize)),
    )
  }
  const flat = () => codesAndAbsmax(weight())
  const dequantize = (set: Tensor[]) => ops.dequantizeBlocks4(packed(weightRows, set), dtype)
  add('dequantizeBlocks4', square, flat, dequantize)
  add('dequantizeBlocks4, nested', square, () => nested(weight()), dequantize)
  if (ops.bestLayout4(device, weightRows, hidden, BLOCK) === 'tiled') {
    const values = (set: Tensor[]) =>
      ops.dequantizeBlocks4({ ...packed(weightRows, set), layout: 'tiled' }, dtype)
    add('dequantizeBlocks4, tiled', square, () => tiled(flat()), values)
    add('dequantizeBlocks4, tiled, nested', square, () => tiled(nested(weight())), values)
  }
  if (dtype === 'float32') {
    add('tile4, to tiled', square, flat, (set) => Object.values(ops.tile4(packed(weightRows, set), 'tiled')))
    add(
      'tile4, to flat',
      square,
      () => tiled(flat()),
      (set) => Object.values(ops.tile4({ ...packed(weightRows, set), layout: 'tiled' }, 'flat')),
    )
  }
  const mapped = (blocksize: number) => () => {
    using values = weight()
    const code = map()
    const { codes, absmax } = ops.quantizeBlocks8(values, code, blocksize)
    return [codes, absmax, code]
  }
  for (const blocksize of [256, 4096]) {
    add(
      `quantizeBlocks8, ${blocksize}`,
      square,
      () => [weight(), map()],
      ([w, code]) => Object.values(ops.quantizeBlocks8(w!, code!, blocksize)),
    )
    add(`dequantizeBlocks8, ${blocksize}`, square, mapped(blocksize), ([c, a, code]) =>
      ops.dequantizeBlocks8(c!, a!, code!, blocksize, dtype),
    )
  }
  add(
    'int8QuantizeRows',
    square,
    () => [weight()],
    ([w]) => {
      const { codes, rowAbsmax } = ops.int8QuantizeRows(w!)
      return [codes, rowAbsmax]
    },
  )
  add(
    'int8DequantizeRows',
    square,
    () => {
      using values = weight()
      const { codes, rowAbsmax } = ops.int8QuantizeRows(values)
      return [codes, rowAbsmax]
    },
    ([c, s]) => ops.int8DequantizeRows(c!, s!, dtype),
  )
  return all.map((one) => ({ ...one, dtype }))
}
