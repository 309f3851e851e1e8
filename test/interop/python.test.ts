/** Folders of ours in Python, and Python's here; see README.md. */
import { execFile, spawnSync } from 'node:child_process'
import { cpSync, mkdirSync, readdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { AutoModelForCausalLM, type BitsAndBytesConfigOptions, type CausalLM } from '../../lib'
import { root, temporaryFolder } from '../support/files'
import { error } from '../support/golden_model'
import { relativeError } from '../support/reference'
import { readSafetensors, type Stored } from '../support/safetensors'

const python = process.env['HALFBYTE_PYTHON'] ?? 'python3'
const script = join(__dirname, 'python_side.py')
const transformers = ['torch', 'transformers', 'accelerate', 'safetensors']

/** What Python lacks of these modules; undefined when it has them. */
function lacking(modules: readonly string[]): string | undefined {
  const { status, stderr } = spawnSync(python, [script, 'check', ...modules], { encoding: 'utf8' })
  return status === 0 ? undefined : (stderr?.trim().split('\n').at(-1) ?? 'no python3')
}

interface PythonModel {
  quantised: string[]
  footprint: number
}

async function run<Said = PythonModel>(...args: string[]): Promise<Said> {
  const { stdout } = await promisify(execFile)(python, [script, ...args], { maxBuffer: 1 << 26 })
  return JSON.parse(stdout.trim().split('\n').at(-1)!) as Said
}

/** All tensors of a folder, with the files that hold them left aside. */
function tensorsOf(folder: string): Map<string, Stored> {
  const files = readdirSync(folder).filter((name) => /^model.*\.safetensors$/.test(name))
  return new Map(files.flatMap((name) => [...readSafetensors(join(folder, name))]))
}

function expectSameTensors(a: ReadonlyMap<string, Stored>, b: ReadonlyMap<string, Stored>): void {
  const bytes = ({ data }: Stored) => Buffer.from(data.buffer, data.byteOffset, data.byteLength)
  expect([...a.keys()].sort()).toEqual([...b.keys()].sort())
  for (const [name, { dtype, shape }] of a) {
    const other = b.get(name)!
    expect([name, dtype, shape]).toEqual([name, other.dtype, other.shape])
    expect([name, bytes(a.get(name)!).equals(bytes(other))]).toEqual([name, true])
  }
}

async function logits(model: CausalLM, ids: number[]): Promise<Float32Array> {
  using y = model.forward(ids)
  return await y.floats()
}

const source = join(root, 'models', 'tinypy-2m')
const ids = [612, 87, 1204, 33, 9, 2500, 41, 77, 3021, 15]

const kinds: [string, BitsAndBytesConfigOptions, number][] = [
  ['nf4', { loadIn4bit: true, bnb4bitQuantType: 'nf4' }, 1e-4],
  ['nf4-double', { loadIn4bit: true, bnb4bitQuantType: 'nf4', bnb4bitUseDoubleQuant: true }, 1e-4],
  ['fp4', { loadIn4bit: true }, 1e-4],
  ['nf4-bf16-storage', { loadIn4bit: true, bnb4bitQuantType: 'nf4', bnb4bitQuantStorage: 'bfloat16' }, 1e-4],
  ['nf4-skip', { loadIn4bit: true, bnb4bitQuantType: 'nf4', llmInt8SkipModules: ['v_proj'] }, 1e-4],
  ['int8', { loadIn8bit: true, bnbExact: true }, 2e-2],
]

const folder = temporaryFolder()
const floats = (path: string, name: string) => readSafetensors(path).get(name)!.data as Float32Array

const withoutTransformers = lacking(transformers)
if (withoutTransformers !== undefined) {
  it.skip(`interop with transformers (${withoutTransformers})`, () => undefined)
} else {
  describe('transformers alone', () => {
    it('loads what we saved in shards, computes the same, and saves the same tensors', async () => {
      const [ours, read] = [join(folder, 'dense'), join(folder, 'dense-read')]
      using model = await AutoModelForCausalLM.fromPretrained(source, { dtype: 'float32' })
      await model.savePretrained(ours, { maxShardSize: '1MB' })
      writeFileSync(join(ours, 'ids.json'), JSON.stringify(ids))
      expect((await run('read', ours, read)).quantised).toEqual([])
      const wanted = floats(join(read, 'logits.safetensors'), 'logits')
      expect(error(await logits(model, ids), wanted).most).toBeLessThan(1e-4)
      expectSameTensors(tensorsOf(ours), tensorsOf(read))
    }, 300_000)

    it.each(kinds)(
      '%s: has our values and logits from what we saved',
      async (name, options) => {
        const [ours, decoded, dense] = ['saved', 'decoded', 'dense'].map((part) =>
          join(folder, `${name}-${part}`),
        )
        using model = await AutoModelForCausalLM.fromPretrained(source, {
          dtype: 'float32',
          quantizationConfig: { ...options, bnbExact: false },
        })
        await model.savePretrained(ours!, { maxShardSize: '1MB' })
        writeFileSync(join(ours!, 'ids.json'), JSON.stringify(ids))
        const said = await run<{ missing: string[]; unexpected: string[] }>('decode', ours!, decoded!)
        expect(said).toEqual({ missing: [], unexpected: [] })
        const computed = await logits(model, ids)
        const wanted = floats(join(decoded!, 'logits.safetensors'), 'logits')
        // Python has the weights alone in int8, not the inputs
        expect(error(computed, wanted).most).toBeLessThan(options.loadIn8bit ? 3e-2 : 1e-4)
        await model.dequantize().savePretrained(dense!)
        const values = readSafetensors(join(decoded!, 'weights.safetensors'))
        for (const [path, { data }] of tensorsOf(dense!)) {
          expect([path, relativeError(data as Float32Array, values.get(path)!.data as Float32Array)]).toEqual(
            [path, expect.closeTo(0, 6)],
          )
        }
      },
      300_000,
    )
  })
}

const withoutBitsandbytes = lacking([...transformers, 'bitsandbytes'])
if (withoutBitsandbytes !== undefined) {
  it.skip(`interop with bitsandbytes (${withoutBitsandbytes})`, () => undefined)
} else {
  describe.each(kinds)('%s', (name, options, most) => {
    const ours = join(folder, name)
    const read = join(folder, `${name}-read`)
    const theirs = join(folder, `${name}-python`)

    it('Python loads what we saved in shards, computes the same, and saves the same tensors', async () => {
      using model = await AutoModelForCausalLM.fromPretrained(source, {
        dtype: 'float32',
        quantizationConfig: options,
      })
      await model.savePretrained(ours, { maxShardSize: '1MB' })
      writeFileSync(join(ours, 'ids.json'), JSON.stringify(ids))
      const { quantised, footprint } = await run('read', ours, read)
      expect(quantised).toEqual(model.replacement!.replaced.map(({ path }) => path).sort())
      expect(footprint).toBe(model.getMemoryFootprint())
      const wanted = floats(join(read, 'logits.safetensors'), 'logits')
      expect(error(await logits(model, ids), wanted).most).toBeLessThan(most)
      expectSameTensors(tensorsOf(ours), tensorsOf(read))
    }, 300_000)

    it('we load what Python quantised and saved, compute the same, and save the same tensors', async () => {
      const plain = join(folder, `${name}-plain`)
      mkdirSync(plain, { recursive: true })
      cpSync(source, plain, { recursive: true })
      writeFileSync(join(plain, 'ids.json'), JSON.stringify(ids))
      // as we wrote it: Python's list of modules to keep replaces its own rules
      const config = join(ours, 'config.json')
      const { quantised, footprint } = await run('write', plain, theirs, config)
      using model = await AutoModelForCausalLM.fromPretrained(theirs, {
        ...(options.bnbExact && { quantizationConfig: { loadIn8bit: true, bnbExact: true } }),
      })
      expect(model.replacement!.replaced.map(({ path }) => path).sort()).toEqual(quantised)
      expect(model.getMemoryFootprint()).toBe(footprint)
      const wanted = floats(join(theirs, 'logits.safetensors'), 'logits')
      // bfloat16 where the checkpoint has it
      expect(error(await logits(model, ids), wanted).most).toBeLessThan(Math.max(most, 2e-2))
      const again = join(folder, `${name}-again`)
      await model.savePretrained(again)
      expectSameTensors(tensorsOf(theirs), tensorsOf(again))
    }, 300_000)
  })
}
