/** Saves whose process is killed: the folder is that of one save, the older or the newer one. */
import { spawn } from 'node:child_process'
import { chmodSync, existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { AutoModelForCausalLM, Checkpoint, saveStateDict, Tensor } from '../../lib'
import { readConfig } from '../../lib/checkpoint/config'
import { rejection, thrown } from '../support/errors'
import { root, temporaryFolder } from '../support/files'
import { itCompiled } from '../support/run'
import { readSafetensors } from '../support/safetensors'
import { writeTinyModel } from '../support/tiny_model'

const temporary = temporaryFolder()
const source = writeTinyModel(join(temporary, 'source'))
/** Rounds of killing at a random moment; more of them by hand. */
const ROUNDS = Number(process.env['HALFBYTE_KILL_ROUNDS'] ?? 6)

/** Runs kill-save.js until it is dead; `delay`: milliseconds after its first save. Returns what killed it. */
function killed(folder: string, first: number, { step = '', delay = -1 }): Promise<NodeJS.Signals | null> {
  const script = join(root, 'test', 'runtime', 'scripts', 'kill-save.js')
  const child = spawn(process.execPath, [script, source, folder, String(first), ...(step ? [step] : [])], {
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  child.stdout.once('data', () => {
    if (delay >= 0) setTimeout(() => child.kill('SIGKILL'), delay)
  })
  return new Promise((resolve) => child.once('close', (_, signal) => resolve(signal)))
}

/** The form that all weights and config.json of a folder have, as a reader sees it who knows nothing of journals. */
function rawForm(folder: string): number | 'no weights' {
  const read = (name: string) =>
    JSON.parse(readFileSync(join(folder, name), 'utf8')) as Record<string, object>
  const index = 'model.safetensors.index.json'
  const shards = existsSync(join(folder, 'model.safetensors'))
    ? ['model.safetensors']
    : existsSync(join(folder, index))
      ? [...new Set(Object.values(read(index)['weight_map'] as Record<string, string>))]
      : []
  if (shards.length === 0) return 'no weights'
  const forms = new Set<unknown>([read('config.json')['form']])
  for (const shard of shards) {
    for (const { data } of readSafetensors(join(folder, shard)).values())
      for (const value of data as Float32Array) forms.add(value)
  }
  expect([...forms]).toHaveLength(1)
  return [...forms][0] as number
}

async function form(folder: string): Promise<number> {
  rawForm(folder)
  using model = await AutoModelForCausalLM.fromPretrained(folder, { device: 'cpu' })
  const found = rawForm(folder)
  expect(readConfig(folder).get('form')).toBe(found)
  expect(await model.lm_head.weight.value.floats()).toEqual(new Float32Array(50 * 64).fill(found as number))
  return found as number
}

describe('a save that is killed', () => {
  itCompiled(
    'at a random moment: the older or the newer one is there, and nothing is left over after the next',
    async () => {
      const folder = join(temporary, 'random')
      let last = 0
      for (let round = 0; round < ROUNDS; round++) {
        expect(await killed(folder, last + 1, { delay: Math.random() * 120 })).toBe('SIGKILL')
        const found = await form(folder)
        expect(found).toBeGreaterThanOrEqual(last + 1)
        last = found
      }
      using x = Tensor.full([2], 1)
      await saveStateDict(folder, new Map([['x', x]]))
      expect(readdirSync(folder).sort()).toEqual(['config.json', 'model.safetensors'])
    },
    30_000 + ROUNDS * 3000,
  )

  // one file over shards, shards over one file, fewer shards over more
  itCompiled.each([2, 0, 1])(
    'before any change of a name, form %d first: so too',
    async (first) => {
      const forms = new Set<number>()
      const raw = new Set<unknown>()
      for (
        let step = 1;
        forms.size < 3 && step < 60;
        step += 1 + (step % 2) * Number(!process.env['HALFBYTE_KILL_ROUNDS'])
      ) {
        const folder = join(temporary, `step-${first}-${step}`)
        expect(await killed(folder, first + 3, { step: String(step) })).toBe('SIGKILL')
        raw.add(rawForm(folder))
        forms.add(await form(folder))
        expect(readdirSync(folder)).not.toContain('.halfbyte-save.json')
      }
      // it went on into the save after the next
      expect([...forms]).toEqual([first + 3, first + 4, first + 5])
      expect(raw).toContain('no weights')
    },
    120_000,
  )
})

describe('a folder with a save to be finished', () => {
  const journal = '.halfbyte-save.json'
  const fresh = (name: string) => {
    const folder = writeTinyModel(join(temporary, name))
    writeFileSync(join(folder, journal), JSON.stringify({ moves: [], removed: [] }))
    return folder
  }

  it.each(['not json', '[]', '{"moves":[["../a","b"]],"removed":[]}', '{"moves":[],"removed":["../x"]}'])(
    'says so where the journal is %s',
    async (text) => {
      const folder = fresh(`bad-${text.length}`)
      writeFileSync(join(folder, journal), text)
      const errors = [
        thrown(() => Checkpoint.open(folder)),
        thrown(() => readConfig(folder)),
        await rejection(AutoModelForCausalLM.fromPretrained(folder)),
        await rejection(saveStateDict(folder, new Map())),
      ]
      for (const error of errors) {
        expect(error.code).toBe('ERR_HALFBYTE_CHECKPOINT')
        expect(error.message).toMatch(/halfbyte-save.json is no journal of a save; remove it/)
      }
    },
  )

  const isRoot = process.getuid?.() === 0
  const itIsRefused = isRoot ? it.skip : it
  itIsRefused(`says so where it may not be written${isRoot ? ' (root may write anywhere)' : ''}`, () => {
    const folder = fresh('locked')
    chmodSync(folder, 0o555)
    try {
      const error = thrown(() => Checkpoint.open(folder))
      expect(error.code).toBe('ERR_HALFBYTE_CHECKPOINT')
      expect(error.message).toMatch(/a save into it was cut off and cannot be finished/)
    } finally {
      chmodSync(folder, 0o755)
    }
  })

  it('is refused to a save for which a folder lies in the way, before anything is changed', async () => {
    const folder = writeTinyModel(join(temporary, 'blocked'))
    mkdirSync(join(folder, 'model-00002-of-00002.safetensors'))
    const before = readdirSync(folder)
    using a = Tensor.full([10], 1)
    using b = Tensor.full([10], 2)
    const state = new Map([
      ['a', a],
      ['b', b],
    ])
    const error = await rejection(saveStateDict(folder, state, { maxShardSize: 40 }))
    expect(error.code).toBe('ERR_HALFBYTE_IO')
    expect(error.message).toMatch(/model-00002-of-00002.safetensors was not written: it is a folder/)
    expect(readdirSync(folder)).toEqual(before)
    using checkpoint = Checkpoint.open(folder)
    expect(checkpoint.files).toHaveLength(1)
  })
})
