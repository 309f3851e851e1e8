/** Threads and memory against the life of environments and models: workers, termination, exit, garbage, many rounds. */
import { readdirSync } from 'node:fs'
import { join } from 'node:path'
import { AutoModelForCausalLM, devices } from '../../lib'
import { root, temporaryFolder } from '../support/files'
import { itCompiled, printed, runScript } from '../support/run'

const folder = temporaryFolder()

describe('workers', () => {
  itCompiled(
    'share the devices with the main thread',
    async () => {
      expect(await runScript('workers.js')).toEqual(printed('done 0, done 0, done 0, done 0\n'))
    },
    60_000,
  )

  itCompiled(
    'may be terminated in the middle of their work',
    async () => {
      expect(await runScript('terminate-workers.js')).toEqual(printed('4 4 4 4\ncpu 0\ncpu:1 0\n'))
    },
    60_000,
  )

  itCompiled(
    'may be terminated in the middle of loading',
    async () => {
      expect(await runScript('terminate-mid-load.js', ['10', folder])).toEqual(printed('done\n'))
    },
    120_000,
  )
})

describe('the process', () => {
  itCompiled(
    'may exit in the middle of loading',
    async () => {
      for (let i = 0; i < 10; i++)
        expect(await runScript('exit-mid-load.js', [String(i * 17), folder])).toEqual(printed(''))
      // what they left on the disk goes with the next one that writes there
      const tiny = join(root, 'models', 'tinypy-2m')
      const quantizationConfig = { loadIn8bit: true, llmInt8EnableFp32CpuOffload: true }
      const options = { deviceMap: 'disk', quantizationConfig, offloadFolder: folder }
      const model = await AutoModelForCausalLM.fromPretrained(tiny, options)
      model.dispose()
      expect(readdirSync(folder)).toEqual([])
    },
    120_000,
  )

  itCompiled(
    'may exit in the middle of work',
    async () => {
      for (let i = 0; i < 20; i++)
        expect(await runScript('exit-mid-work.js', [String(i - 4)])).toEqual(printed(''))
    },
    60_000,
  )

  itCompiled(
    'is kept alive by pending reads and by nothing else',
    async () => {
      expect(await runScript('quiet-end.js')).toEqual(printed('read 400000\nend\n'))
    },
    60_000,
  )
})

itCompiled(
  'the garbage collector frees what nobody disposed',
  async () => {
    expect(await runScript('garbage.js', [], ['--expose-gc'])).toEqual(
      printed('in use: true\nsum: 6\nkept after use: false\nleft: 0\n'),
    )
  },
  60_000,
)

describe.each(devices().map(({ name }) => name))('on %s', (name) => {
  itCompiled(
    'two hundred models, loaded, used and disposed one after the other, leave no memory taken',
    async () => {
      const { stdout, ...rest } = await runScript('rounds.js', [name, '200'], ['--expose-gc'])
      expect(rest).toEqual({ code: 0, signal: null, stderr: '' })
      const left = JSON.parse(stdout) as Record<'tensors' | 'reserved' | 'heap' | 'process', number>
      expect(left.tensors).toBe(0)
      // in MiB; one round takes 10 or so
      expect(left.reserved).toBeLessThanOrEqual(0)
      expect(left.heap).toBeLessThan(8)
      expect(left.process).toBeLessThan(32)
    },
    180_000,
  )
})
