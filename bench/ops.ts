/**
 * Every kind of op beside a copy of as many bytes, on the shapes of an 8-billion-parameter Llama. On a GPU the operands
 * have 64 MB and more and are taken, as the results are, in turn from more memory than the caches hold, by replays of
 * graphs; on the CPU they are those of a step of 64 tokens.
 */
import { HalfbyteError, ops, Tensor, type Device } from 'halfbyte'
import {
  attentionBytes,
  attentionOperands,
  LONG_CONTEXTS,
  type AttentionShape,
} from './support/attention_operands.js'
import { runAsProgram, type Benchmark, type Context, type Report, type Row } from './support/benchmark.js'
import { compare, type Contender } from './support/measure.js'
import { LARGE, opCases, SMALL, type OpCase, type Results } from './support/op_cases.js'
import { normalTensor } from './support/random.js'
import { coldCopiesOnGpu, copyBandwidth, timeReplays } from './support/replays.js'

/** A decode step after 2048 tokens; on a GPU also steps and a whole prompt with long contexts in 16 bits. */
function attentions(device: Device): OpCase[] {
  const short: AttentionShape = { ...LONG_CONTEXTS[0]!, dtype: 'float32', context: 2048 }
  const shapes = [short, ...(device.type === 'cuda' ? LONG_CONTEXTS : [])]
  return shapes.map((shape) => ({
    op: shape.queries > 1 ? 'pagedAttention, prompt' : 'pagedAttention',
    dtype: shape.dtype,
    shape: `${shape.sequences * shape.queries} x ${shape.heads} x ${shape.headDim} on ${shape.context}`,
    bytes: attentionBytes(shape),
    operands: () => {
      const { q, keys, values, batch } = attentionOperands(shape, device)
      return [q, keys, values, batch.queryStarts, batch.lengths, batch.blockTable]
    },
    call: ([q, keys, values, queryStarts, lengths, blockTable]) => {
      const batch = { queryStarts: queryStarts!, lengths: lengths!, blockTable: blockTable! }
      return [ops.pagedAttention(q!, keys!, values!, batch, { scale: 1 / Math.sqrt(shape.headDim) })]
    },
  }))
}

const dispose = (tensors: Results) => tensors.forEach((tensor) => tensor.dispose())
const nbytes = (tensors: Results) => tensors.reduce((sum, tensor) => sum + tensor.nbytes, 0)

async function onCpu({ device, rounds }: Context): Promise<Report> {
  const rows: Row[] = []
  for (const { op, shape, operands, call, bytes } of [
    ...opCases(device, 'float32', SMALL),
    ...attentions(device),
  ]) {
    const set = operands()
    const contender: Contender = {
      name: op,
      call: () => {
        const [first, ...others] = call(set)
        dispose(others)
        return first!
      },
    }
    const results = call(set)
    const moved = bytes ?? nbytes(set) + nbytes(results)
    dispose(results)
    const source = normalTensor([Math.ceil(moved / 8)], 1, device)
    const target = Tensor.empty(source.shape, 'float32', device)
    const copy: Contender = { name: 'copy', call: () => ops.copyInto(target, source).share() }
    const times = await compare(device, [contender, copy], { rounds })
    const { min, median } = times.get(op)!
    const baseline = times.get('copy')!.min
    rows.push({
      op,
      shape,
      us: min * 1e6,
      median_us: median * 1e6,
      gb_per_s: moved / min / 1e9,
      copy_us: baseline * 1e6,
      share: baseline / min,
    })
    dispose([...set, source, target])
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
}

/** A time without a result is worth nothing. */
async function checkFinite(op: string, results: Results): Promise<void> {
  for (const result of results) {
    if (!['float32', 'float16', 'bfloat16'].includes(result.dtype)) continue
    using count = ops.countNonfinite(result)
    if ((await count.item()) !== 0)
      throw new HalfbyteError('ERR_HALFBYTE_INTERNAL', `${op} gave numbers that are not finite`)
  }
}

async function timeOnGpu(device: Device, { op, operands, call, bytes }: OpCase, rounds: number) {
  const sets = [operands()]
  const results = call(sets[0]!)
  await checkFinite(op, results)
  const moved = bytes ?? nbytes(sets[0]!) + nbytes(results)
  dispose(results)
  const copies = coldCopiesOnGpu(moved)
  while (sets.length < copies) sets.push(sets[0]!.map((tensor) => tensor.clone()))
  const queue = (i: number) => {
    const made = call(sets[i]!)
    return { dispose: () => dispose(made) }
  }
  try {
    const [seconds] = await timeReplays(device, [{ copies, call: queue }], rounds, copies)
    return { moved, seconds: seconds! }
  } finally {
    sets.forEach(dispose)
  }
}

async function onGpu({ device, rounds }: Context): Promise<Report> {
  const copy = await copyBandwidth(device, rounds)
  const rows: Row[] = []
  const cases = (['bfloat16', 'float32'] as const).flatMap((dtype) => opCases(device, dtype, LARGE))
  for (const one of [...cases, ...attentions(device)]) {
    const { moved, seconds } = await timeOnGpu(device, one, rounds)
    rows.push({
      op: one.op,
      dtype: one.dtype,
      shape: one.shape,
      mb: moved / 1e6,
      us: seconds * 1e6,
      tb_per_s: moved / seconds / 1e12,
      copy_us: (moved / copy) * 1e6,
      share: moved / seconds / copy,
    })
  }
  return {
    columns: {
      op: 'op',
      dtype: 'dtype',
      shape: 'shape',
      mb: 'MB',
      us: 'us',
      tb_per_s: 'TB/s',
      share: "of the copy's speed",
    },
    rows,
    baseline: 'copy_us',
    notes: [`copy in this run: ${(copy / 1e12).toFixed(2)} TB/s, read and written`],
  }
}

export const benchmark: Benchmark = {
  name: 'ops',
  summary: 'single ops, beside a copy that moves as many bytes',
  run: (context) => (context.device.type === 'cuda' ? onGpu(context) : onCpu(context)),
}

export { benchmark as ops }

runAsProgram(benchmark, module)
