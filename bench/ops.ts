/** Every kind of op on the shapes of an 8-billion-parameter Llama, beside a copy that moves the same bytes. */
import { ops, Tensor, type Device } from 'halfbyte'
import { runAsProgram, type Benchmark, type Row } from './support/benchmark.js'
import { compare, type Contender } from './support/measure.js'
import { normalTensor } from './support/random.js'

const HIDDEN = 4096
const INNER = 14336
const ROWS = 64
const VOCABULARY = 128256
const HEADS = 32
const KV_HEADS = 8
const HEAD = 128
const CONTEXT = 2048
const BLOCK = 16

interface Case extends Contender {
  shape: string
  /** Read and written. */
  bytes: number
}

/** One sequence that has CONTEXT tokens in the cache and asks about one more. */
function attention(device: Device): Case {
  const blocks = CONTEXT / BLOCK
  const cache = [1, 2].map((seed) => normalTensor([blocks, BLOCK, KV_HEADS, HEAD], 1, device, seed))
  const integers = (values: number[], shape: number[]) =>
    Tensor.from(Int32Array.from(values), { shape, device })
  const batch = {
    queryStarts: integers([0, 1], [2]),
    lengths: integers([CONTEXT], [1]),
    blockTable: integers(
      Array.from({ length: blocks }, (_, i) => i),
      [1, blocks],
    ),
  }
  const q = normalTensor([1, HEADS, HEAD], 1, device)
  return {
    name: 'pagedAttention',
    shape: `1 x ${HEADS} x ${HEAD} on ${CONTEXT}`,
    bytes: 2 * CONTEXT * KV_HEADS * HEAD * 4,
    call: () => ops.pagedAttention(q, cache[0]!, cache[1]!, batch, { scale: 1 / Math.sqrt(HEAD) }),
  }
}

function cases(device: Device): Case[] {
  const x = normalTensor([ROWS, HIDDEN], 1, device)
  const y = normalTensor([ROWS, HIDDEN], 1, device, 2)
  const gate = normalTensor([ROWS, INNER], 1, device)
  const norm = normalTensor([HIDDEN], 1, device, 3)
  const table = normalTensor([VOCABULARY / 8, HIDDEN], 1, device)
  const ids = Tensor.from(
    Int32Array.from({ length: ROWS }, (_, i) => (i * 7919) % (VOCABULARY / 8)),
    { device },
  )
  const logits = normalTensor([1, VOCABULARY], 1, device)
  const weight = normalTensor([HIDDEN, HIDDEN], 0.02, device)
  const { codes, absmax } = ops.quantizeBlocks4(weight, 'nf4', 64)
  const packed: ops.Packed4 = { codes, absmax, quantType: 'nf4', blocksize: 64, n: HIDDEN, k: HIDDEN }
  const small = ROWS * HIDDEN * 4
  const large = HIDDEN * HIDDEN * 4
  const rows = `${ROWS} x ${HIDDEN}`
  const square = `${HIDDEN} x ${HIDDEN}`
  return [
    { name: 'add', shape: rows, bytes: 3 * small, call: () => ops.add(x, y) },
    { name: 'rmsNorm', shape: rows, bytes: 2 * small, call: () => ops.rmsNorm(x, norm, 1e-5) },
    { name: 'layerNorm', shape: rows, bytes: 2 * small, call: () => ops.layerNorm(x, norm, norm, 1e-5) },
    {
      name: 'gatedActivation',
      shape: `${ROWS} x ${INNER}`,
      bytes: 3 * ROWS * INNER * 4,
      call: () => ops.gatedActivation(gate, gate, 'silu'),
    },
    { name: 'gatherRows', shape: rows, bytes: 2 * small, call: () => ops.gatherRows(table, ids) },
    { name: 'to float16', shape: square, bytes: 1.5 * large, call: () => weight.to('float16') },
    {
      name: 'quantizeBlocks4',
      shape: square,
      bytes: large * (1 + 1 / 8 + 1 / 64),
      call: () => {
        const made = ops.quantizeBlocks4(weight, 'nf4', 64)
        made.codes.dispose()
        return made.absmax
      },
    },
    {
      name: 'dequantizeBlocks4',
      shape: square,
      bytes: large * (1 + 1 / 8 + 1 / 64),
      call: () => ops.dequantizeBlocks4(packed, 'float32'),
    },
    {
      name: 'int8QuantizeRows',
      shape: square,
      bytes: large * 1.25,
      call: () => {
        const made = ops.int8QuantizeRows(weight)
        made.codes.dispose()
        return made.rowAbsmax
      },
    },
    attention(device),
    { name: 'argmax', shape: `1 x ${VOCABULARY}`, bytes: VOCABULARY * 4, call: () => ops.argmax(logits) },
  ]
}

export const benchmark: Benchmark = {
  name: 'ops',
  summary: 'single ops on float32, beside a copy that moves as many bytes',
  async run({ device, rounds }) {
    const rows: Row[] = []
    for (const { shape, bytes, ...contender } of cases(device)) {
      const source = normalTensor([Math.ceil(bytes / 8)], 1, device)
      const target = Tensor.empty(source.shape, 'float32', device)
      const copy: Contender = { name: 'copy', call: () => ops.copyInto(target, source).share() }
      const times = await compare(device, [contender, copy], { rounds })
      const { min, median } = times.get(contender.name)!
      const baseline = times.get('copy')!.min
      rows.push({
        op: contender.name,
        shape,
        us: min * 1e6,
        median_us: median * 1e6,
        gb_per_s: bytes / min / 1e9,
        copy_us: baseline * 1e6,
        share: baseline / min,
      })
      source.dispose()
      target.dispose()
    }
    return {
      columns: {
        op: 'op',
        shape: 'shape',
        us: 'us',
        median_us: 'median us',
        gb_per_s: 'GB/s',
        copy_us: 'copy us',
        share: "of the copy's speed",
      },
      rows,
      baseline: 'copy_us',
      notes: [],
    }
  },
}

export { benchmark as ops }

runAsProgram(benchmark, module)
