/** Threads against the life of environments: workers, termination, exit, garbage collection. */
import { itCompiled, printed, runScript } from '../support/run'

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
})

describe('the process', () => {
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
