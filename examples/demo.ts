/**
 * What `npm start` shows: a small model loaded from a Hugging Face checkpoint in four forms, what quantising it changes,
 * and text from the 4-bit one.
 */
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import {
  AutoModelForCausalLM,
  evaluationIds,
  getTrueFootprint,
  HalfbyteError,
  perplexity,
  systemInfo,
  type BitsAndBytesConfigOptions,
  type CausalLM,
} from 'halfbyte'
import { Progress } from 'halfbyte/internal/cli/progress.js'
import { formatBytes, formatTable } from 'halfbyte/internal/cli/table.js'

const models = join(__dirname, '../../models')
const folder = join(models, 'tinypy-2m')
const PROMPT = 'def read_file(path):\n    """'

const forms: [string, BitsAndBytesConfigOptions | undefined][] = [
  ['float32', undefined],
  ['int8 (LLM.int8())', { loadIn8bit: true }],
  ['NF4', { loadIn4bit: true, bnb4bitQuantType: 'nf4' }],
  ['NF4, double quantised', { loadIn4bit: true, bnb4bitQuantType: 'nf4', bnb4bitUseDoubleQuant: true }],
]

function load(quantizationConfig: BitsAndBytesConfigOptions | undefined): Promise<CausalLM> {
  return AutoModelForCausalLM.fromPretrained(folder, { quantizationConfig, dtype: 'float32' })
}

/** Layers that were treated alike, in one row: model.layers.*.mlp.up_proj. */
function grouped(paths: readonly string[]): Map<string, number> {
  const groups = new Map<string, number>()
  for (const path of paths) {
    const name = path.replace(/\.\d+(?=\.)/g, '.*')
    groups.set(name, (groups.get(name) ?? 0) + 1)
  }
  return groups
}

function showReplacement(model: CausalLM): void {
  const { replaced, kept } = model.replacement!
  const rows = [...grouped(replaced.map(({ path }) => path))].map(([name, count]) => {
    const sample = replaced.find(({ path }) => path.replace(/\.\d+(?=\.)/g, '.*') === name)!
    return [name, count, `${sample.from} -> ${sample.to}`, sample.shape.join(' x ')]
  })
  for (const { path, reason } of kept) rows.push([path, 1, `kept: ${reason}`, ''])
  console.log(formatTable(['linear layers', 'count', 'replaceWithQuantizedLinear()', 'shape'], rows))
}

async function main(): Promise<void> {
  const text = readFileSync(join(models, 'heldout.py.txt'), 'utf8')
  const { cpu, devices } = systemInfo()
  console.log(`halfbyte on ${devices.join(', ')} (${cpu.isa}, ${cpu.threads} threads): models/tinypy-2m\n`)

  const rows: (string | number)[][] = []
  let small: CausalLM | undefined
  for (const [name, config] of forms) {
    const model = await load(config)
    using progress = new Progress(`Perplexity, ${name}`)
    const result = await perplexity(model, evaluationIds(model, text), {
      onProgress: (done, total) => progress.update(done, total),
    })
    progress.end()
    const linear = model.replacement?.replaced.reduce((sum, { bytesAfter }) => sum + bytesAfter, 0)
    rows.push([
      name,
      formatBytes(getTrueFootprint(model)),
      linear === undefined ? '' : formatBytes(linear),
      result.perplexity.toFixed(3),
    ])
    small?.dispose()
    small = model
  }
  const model = small!
  const dense = model.replacement!.replaced.reduce((sum, { bytesBefore }) => sum + bytesBefore, 0)
  rows[0]![2] = formatBytes(dense)
  showReplacement(model)
  console.log(`\n${formatTable(['weights', 'model', 'its linear layers', 'perplexity'], rows)}\n`)

  console.log('A completion by the double-quantised NF4 model:\n')
  process.stdout.write(PROMPT)
  for await (const part of model.stream(PROMPT, { maxNewTokens: 96, temperature: 0.7, topP: 0.9, seed: 7 })) {
    process.stdout.write(part.text)
  }
  console.log()
  model.dispose()
}

main().catch((error: unknown) => {
  console.error(error instanceof HalfbyteError ? `${error.message} (${error.code})` : error)
  process.exitCode = 1
})
