/** The program as a shell runs it: exit status, streams, signals. */
import { spawn, spawnSync } from 'node:child_process'
import { halfbyte, program } from '../support/cli'

test('without a command it shows the overview and exits with 2', () => {
  const { status, stdout } = halfbyte([])
  expect(status).toBe(2)
  expect(stdout).toContain('halfbyte COMMAND')
})

test('--version is that of the package', () => {
  const { version } = jest.requireActual<{ version: string }>('../../package.json')
  expect(halfbyte(['--version']).stdout).toBe(`${version}\n`)
})

const commands = ['generate', 'quantize', 'eval', 'inspect', 'doctor', 'bench']

test.each(commands)('%s --help names --json and --device', (command) => {
  const { status, stdout } = halfbyte([command, '--help'])
  expect(status).toBe(0)
  expect(stdout).toContain('--json')
  expect(stdout).toContain('--device')
})

test.each([
  ['an unknown command', ['nope']],
  ['an unknown option', ['doctor', '--nope']],
  ['an unknown benchmark', ['bench', 'nope']],
  ['too many arguments', ['doctor', 'x']],
])('%s is one line on stderr and exit status 2', (_, args) => {
  const { status, stdout, stderr } = halfbyte(args)
  expect(status).toBe(2)
  expect(stdout).toBe('')
  expect(stderr).toMatch(/^halfbyte: [^\n]+ \(ERR_HALFBYTE_USAGE\)\n$/)
})

test('doctor --json tells the binding, the instruction set and the devices', () => {
  const { status, stdout } = halfbyte(['doctor', '--json'])
  expect(status).toBe(0)
  const found = JSON.parse(stdout) as {
    library: { binding: string; devices: string[]; cpu: { isa: string; threads: number } }
  }
  expect(found.library.binding).toMatch(/halfbyte\.node$/)
  expect(found.library.devices).toContain('cpu')
  expect(['plain', 'avx2', 'avx512']).toContain(found.library.cpu.isa)
  expect(found.library.cpu.threads).toBeGreaterThanOrEqual(1)
})

test('doctor says why the addon does not load', () => {
  const { status, stdout } = spawnSync(process.execPath, [program, 'doctor'], {
    encoding: 'utf8',
    env: { ...process.env, HALFBYTE_BINDING: '/nowhere/halfbyte.node' },
  })
  expect(status).toBe(1)
  expect(stdout).toContain('does not load')
  expect(stdout).toContain('/nowhere/halfbyte.node: not there')
})

test('a reader that goes away is no error', async () => {
  const child = spawn(process.execPath, [program, 'doctor'], { stdio: ['ignore', 'pipe', 'pipe'] })
  child.stdout.destroy()
  let stderr = ''
  child.stderr.on('data', (chunk: Buffer) => (stderr += chunk.toString()))
  const status = await new Promise((resolve) => child.on('close', resolve))
  expect(stderr).toBe('')
  expect(status).toBe(0)
})
