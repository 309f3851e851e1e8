/** The parts of scripts/setup.mjs, run as the script runs them: by Node, as modules. */
import { spawn, spawnSync } from 'node:child_process'
import { cpSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

const root = join(__dirname, '../..')
const part = (name: string) => JSON.stringify(`${root}/scripts/setup/${name}.mjs`)
let folder: string

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'halfbyte-setup-'))
})
afterEach(() => {
  rmSync(folder, { recursive: true, force: true })
})

/** Runs a module and returns what it printed. */
function evaluate(code: string, env: Record<string, string> = {}): string {
  const result = spawnSync(process.execPath, ['--input-type=module', '-e', code], {
    encoding: 'utf8',
    env: { ...process.env, ...env },
  })
  return result.stdout + result.stderr
}

test('of several set-ups one runs at a time, and the lock of a dead one is taken over', async () => {
  const lock = join(folder, 'lock')
  const log = join(folder, 'log')
  const dead = spawnSync(process.execPath, ['-e', '']).pid
  writeFileSync(lock, String(dead))
  const code = `
    import { appendFileSync } from 'node:fs'
    import { setTimeout as sleep } from 'node:timers/promises'
    import { acquire } from ${part('lock')}
    const release = await acquire(${JSON.stringify(lock)})
    appendFileSync(${JSON.stringify(log)}, 'in\\n')
    await sleep(30)
    appendFileSync(${JSON.stringify(log)}, 'out\\n')
    release()`
  const children = Array.from({ length: 4 }, () =>
    spawn(process.execPath, ['--input-type=module', '-e', code], { stdio: 'ignore' }),
  )
  const codes = await Promise.all(
    children.map((child) => new Promise((resolve) => child.on('close', resolve))),
  )
  expect(codes).toEqual([0, 0, 0, 0])
  expect(readFileSync(log, 'utf8')).toBe('in\nout\n'.repeat(4))
})

test('a step that fails is reported with its output, not with a stack', () => {
  const text = evaluate(`
    import { run, SetupError } from ${part('run')}
    await run('Building', process.execPath, ['-e', 'console.error("line 7: no"); process.exit(3)']).catch((error) => {
      console.log(error instanceof SetupError, error.message)
    })`)
  expect(text).toBe('true line 7: no\n\nBuilding failed (exit code 3).\n')
})

test.each([
  ['findCompiler()', { CXX: '/nowhere/g++' }, /needs a C\+\+17 compiler .*\/nowhere\/g\+\+: not found/],
  [
    'findBuilder()',
    { PATH: '/nowhere', PYTHON: '' },
    /CMake 3\.24 or newer \(not found\) or with node-gyp, which needs Python 3/,
  ],
  ['cudaSetting()', { HALFBYTE_CUDA: 'MAYBE' }, /HALFBYTE_CUDA is MAYBE; it may be ON, OFF or AUTO/],
])('%s says what is missing', (call, env, message) => {
  const text = evaluate(
    `import * as needs from ${part('needs')}
    try { needs.${call} } catch (error) { console.log(error.constructor.name, error.message) }`,
    env,
  )
  expect(text).toMatch(/^SetupError/)
  expect(text).toMatch(message)
})

describe.each([
  ['11.8', ['75', '80', '86', '89', '90'], /needs nvcc 12\.4 or newer; .*\/bin\/nvcc is 11\.8/],
  ['12.4', ['75', '80', '89', '90'], '-Xfatbin=-compress-all', '75-real;80-real;90a-real;90-virtual'],
  ['12.8', ['75', '80', '90', '100', '120'], '--compress-mode=size', '75-real;80-real;90a-real;100-real;120'],
  ['13.0', ['75', '80', '90', '100', '120'], '--compress-mode=size', '75-real;80-real;90a-real;100-real;120'],
])('with nvcc %s', (version, archs, compress, release?: string) => {
  const ask = (code: string) => {
    mkdirSync(join(folder, 'bin'))
    const codes = archs.map((arch) => `sm_${arch}`).join('\\n')
    writeFileSync(
      join(folder, 'bin/nvcc'),
      `#!/bin/sh\ncase $1 in\n  --version) echo 'Cuda compilation tools, release ${version}, V${version}.1' ;;\n` +
        `  --list-gpu-code) printf '${codes}\\n' ;;\nesac\n`,
      { mode: 0o755 },
    )
    const env = { CUDA_HOME: folder, HALFBYTE_CUDA: 'ON', HALFBYTE_CUDA_ARCHS: '' }
    return evaluate(`import cuda from ${JSON.stringify(join(root, 'scripts/cuda.cjs'))}\n${code}`, env).trim()
  }

  if (release === undefined) {
    test('the set-up says what is needed', () => {
      const code = `
        import { cudaSetting } from ${part('needs')}
        try { cudaSetting() } catch (error) { console.log(error.constructor.name, error.message) }`
      expect(ask(code)).toMatch(compress)
    })
    return
  }
  test('a release is for every GPU that it knows, and compressed as it can', () => {
    expect(ask('console.log(cuda.releaseArchs(), cuda.compress())')).toBe(`${release} ${compress as string}`)
  })
})

describe('what is up to date', () => {
  const stamped = (change: () => void) => {
    mkdirSync(join(folder, 'src'))
    writeFileSync(join(folder, 'src/a.ts'), 'a')
    writeFileSync(join(folder, 'product'), '')
    const stamp = (rest: string) =>
      evaluate(`
        import { hashOf, Stamp } from ${part('stamp')}
        const root = ${JSON.stringify(folder)}
        const stamp = new Stamp(root + '/stamps/x', root + '/product', hashOf(root, ['src', 'absent'], {}))
        ${rest}`)
    stamp('stamp.set()')
    change()
    return stamp('console.log(stamp.fresh)').trim()
  }

  test('is what was built from the same content', () => {
    expect(stamped(() => writeFileSync(join(folder, 'src/a.ts'), 'a'))).toBe('true')
  })
  test('is not what a file was changed, added or removed under', () => {
    expect(stamped(() => writeFileSync(join(folder, 'src/a.ts'), 'b'))).toBe('false')
    rmSync(join(folder, 'src'), { recursive: true })
    expect(stamped(() => writeFileSync(join(folder, 'src/b.ts'), ''))).toBe('false')
    rmSync(join(folder, 'src'), { recursive: true })
    expect(stamped(() => rmSync(join(folder, 'src/a.ts')))).toBe('false')
  })
  test('is not what is gone', () => {
    expect(stamped(() => rmSync(join(folder, 'product')))).toBe('false')
  })

  test('packages are up to date when they are what the lock file says', () => {
    const matches = () =>
      evaluate(`
        import { modulesMatch } from ${part('stamp')}
        console.log(modulesMatch(${JSON.stringify(folder)}))`).trim()
    expect(matches()).toBe('false')
    cpSync(join(root, 'package-lock.json'), join(folder, 'package-lock.json'))
    mkdirSync(join(folder, 'node_modules'))
    const installed = join(folder, 'node_modules/.package-lock.json')
    cpSync(join(root, 'node_modules/.package-lock.json'), installed)
    expect(matches()).toBe('true')
    const lock = JSON.parse(readFileSync(installed, 'utf8')) as {
      packages: Record<string, { version: string }>
    }
    lock.packages['node_modules/typescript']!.version = '1.0.0'
    writeFileSync(installed, JSON.stringify(lock))
    expect(matches()).toBe('false')
  })
})
