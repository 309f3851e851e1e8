/** The commands that load a model, as a shell runs them, on the model that comes with the repository. */
import { spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, readdirSync, symlinkSync, writeFileSync } from 'node:fs'
import { basename, join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import { halfbyte, program } from '../support/cli'
import { root, temporaryFolder } from '../support/files'

const model = join(root, 'models/tinypy-2m')
const text = join(root, 'models/heldout.py.txt')
const folder = temporaryFolder()

function json(args: readonly string[], input?: string): Record<string, unknown> {
  const { stdout, stderr, status } = halfbyte([...args, '--device', 'cpu', '--json'], input)
  expect({ stderr, status }).toEqual({ stderr: '', status: 0 })
  return JSON.parse(stdout) as Record<string, unknown>
}

describe('generate', () => {
  test('prints the prompt and what follows', () => {
    const { stdout, status } = halfbyte(['generate', model, 'def main():', '--max-new-tokens', '8'])
    expect(status).toBe(0)
    expect(stdout).toMatch(/^def main\(\):\n.*\S/)
  })

  test('takes the prompt from a pipe, and a seed makes sampling repeatable', () => {
    const args = ['generate', model, '--max-new-tokens', '12', '--temperature', '0.9', '--load-in-4bit']
    const [first, again, other] = ['1', '1', '2'].map((seed) => json([...args, '--seed', seed], 'class '))
    expect(first!.tokenIds).toHaveLength(12)
    expect(again!.tokenIds).toEqual(first!.tokenIds)
    expect(other!.tokenIds).not.toEqual(first!.tokenIds)
    expect(first!.weights).toBe('nf4')
  })

  test('ends before a stop string', () => {
    const whole = json(['generate', model, 'def main():', '--max-new-tokens', '24']).text as string
    const stop = whole.slice(6, 12)
    const cut = json(['generate', model, 'def main():', '--max-new-tokens', '24', '--stop', stop])
    expect(cut).toMatchObject({ finishReason: 'stop', text: whole.slice(0, whole.indexOf(stop)) })
  })

  test('Ctrl-C stops it with exit status 130', async () => {
    const child = spawn(process.execPath, [program, 'generate', model, 'def', '--max-new-tokens', '2000'])
    let stderr = ''
    child.stderr.on('data', (chunk: Buffer) => (stderr += chunk.toString()))
    await new Promise((resolve) => child.stdout.once('data', resolve))
    child.kill('SIGINT')
    const status = await new Promise((resolve) => child.on('close', resolve))
    expect({ status, stderr }).toEqual({ status: 130, stderr: '' })
  })
})

test('Ctrl-C stops a benchmark, which would run on for long', async () => {
  const args = [program, 'bench', 'linear8bit', '--device', 'cpu', '--rounds', '100000']
  const child = spawn(process.execPath, args, { stdio: 'ignore' })
  const closed = once(child, 'close')
  await setTimeout(1000)
  child.kill('SIGINT')
  expect(await closed).toEqual([130, null])
})

test('what generate is refused is said before anything is printed', () => {
  const args = ['generate', model, 'def', '--device', 'cpu', '--repetition-penalty', '0']
  expect(halfbyte(args)).toMatchObject({ status: 1, stdout: '' })
})

describe('a device map', () => {
  const run = (...args: string[]) =>
    halfbyte(['generate', model, 'def main():', '--max-new-tokens', '6', ...args])

  test('by paths or by strategy spreads the model, and changes nothing else', () => {
    const whole = run('--device', 'cpu').stdout
    const map = '{"": "cpu", "model.layers.1": "cpu:1", "lm_head": "disk"}'
    expect(run('--device-map', map)).toMatchObject({ stdout: whole, status: 0 })
    expect(run('--device-map', 'auto', '--max-memory', 'cpu:1=2MB,cpu=1GiB')).toMatchObject({
      stdout: whole,
      status: 0,
    })
  })

  test.each([
    [['--device-map', '{"":'], /--device-map is not JSON/],
    [['--device-map', 'auto', '--max-memory', 'cpu'], /--max-memory has "cpu"; write 0=10GiB/],
    [['--device-map', 'auto', '--max-memory', 'cpu=much'], /"much" is not a size/],
    [['--cpu-offload'], /--cpu-offload needs --load-in-4bit/],
  ])('%j is refused', (args, message) => {
    const { status, stderr } = run(...args)
    expect(status).not.toBe(0)
    expect(stderr).toMatch(message)
  })
})

test('inspect lists every module with its kind, shape and bytes', () => {
  const found = json(['inspect', model, '--load-in-8bit', '--skip-modules', 'o_proj,layers.1'])
  const modules = found.modules as {
    path: string
    kind: string
    shape: number[]
    bytes: number
    note?: string
  }[]
  const row = (path: string) => modules.find((entry) => entry.path === path)
  expect(row('model.layers.0.mlp.up_proj')).toMatchObject({
    kind: 'Linear8bit',
    shape: [512, 192],
    bytes: 512 * 192 + 512 * 4,
  })
  expect(row('model.layers.0.self_attn.o_proj')).toMatchObject({ kind: 'Linear', note: "named by 'o_proj'" })
  expect(row('model.layers.1.mlp.up_proj')!.kind).toBe('Linear')
  expect(row('lm_head')).toMatchObject({ kind: 'Linear', bytes: 0, note: expect.stringContaining('tied') })
  expect(modules.reduce((sum, { bytes }) => sum + bytes, 0)).toBe(found.total)
})

test('quantize writes a checkpoint that evaluates as the model quantised on loading does', () => {
  const out = join(folder, 'nf4')
  const flags = ['--load-in-4bit', '--double-quant']
  expect(json(['quantize', model, '--out', out, ...flags])).toMatchObject({ replaced: 28 })
  const evaluate = (from: string, more: string[] = []) =>
    json(['eval', from, '--text', text, '--limit', '1025', '--dtype', 'bfloat16', ...more])
  const saved = evaluate(out)
  expect(saved.weights).toBe('nf4, double quantised')
  expect(saved.tokens).toBe(1024)
  expect(saved.perplexity).toBe(evaluate(model, flags).perplexity)
})

test.each([
  ['nf4, double quantised', ['--load-in-4bit', '--double-quant']],
  ['fp4', ['--load-in-4bit', '--quant-type', 'fp4']],
  ['int8, threshold 6', ['--load-in-8bit', '--bnb-exact']],
])('flags say of a quantised checkpoint only what was given: %s', (weights, how) => {
  const out = join(folder, `saved ${weights}`)
  json(['quantize', model, '--out', out, ...how])
  const evaluate = (...more: string[]) => json(['eval', out, '--text', text, '--limit', '65', ...more])
  const saved = evaluate()
  expect(saved.weights).toBe(weights)
  const { weights: again, perplexity } = evaluate(how[0]!)
  expect({ again, perplexity }).toEqual({ again: weights, perplexity: saved.perplexity })
  const map = '{"": "cpu:1", "model.layers.1": "cpu"}'
  const run = (...more: string[]) =>
    halfbyte(['generate', out, 'def main():', '--max-new-tokens', '4', '--device-map', map, ...more])
  expect(run().status).toBe(1)
  expect(run('--cpu-offload')).toMatchObject({ status: 0 })
})

test('quantize does not write over the model that it reads, by whatever path', () => {
  const link = join(folder, 'link')
  symlinkSync(model, link)
  for (const [from, to] of [
    [link, model],
    [model, `${link}/`],
    [model, `${folder}/../${basename(folder)}/link`],
  ] as const) {
    const { status, stderr } = halfbyte(['quantize', from, '--out', to, '--load-in-4bit'])
    expect(stderr).toMatch(/folder of the model itself/)
    expect(status).toBe(2)
  }
})

test('quantize leaves nothing behind when the disk is full', () => {
  const out = join(folder, 'full')
  const command = `trap '' XFSZ; ulimit -f 256; exec "$0" "$@"`
  const { status, stderr } = spawnSync(
    'bash',
    ['-c', command, process.execPath, program, 'quantize', model, '--out', out, '--load-in-4bit'],
    { encoding: 'utf8' },
  )
  expect(status).toBe(1)
  expect(stderr).toMatch(/^halfbyte: .*model\.safetensors was not written: .* \(ERR_HALFBYTE_IO\)\n$/)
  expect(existsSync(out) ? readdirSync(out) : []).toEqual([])
})

describe('what is wrong with the command line is said with exit status 2', () => {
  test.each([
    ['no prompt twice', ['generate', model, 'a', '--prompt', 'b'], /given more than once/],
    ['both load-in flags', ['eval', model, '--text', text, '--load-in-4bit', '--load-in-8bit'], /choose one/],
    [
      'a flag of the other mode',
      ['inspect', model, '--load-in-8bit', '--quant-type', 'nf4'],
      /needs --load-in-4bit/,
    ],
    ['an unknown type', ['inspect', model, '--load-in-4bit', '--quant-type', 'nf5'], /it may be nf4, fp4/],
    ['no text', ['eval', model], /--text FILE is missing/],
    ['a window of 1', ['eval', model, '--text', text, '--window', '1'], /--window/],
    ['nowhere to write', ['quantize', model, '--load-in-4bit'], /--out DIR is missing/],
    ['no way to quantise', ['quantize', model, '--out', 'x'], /--load-in-4bit or --load-in-8bit/],
    ['the model itself', ['quantize', model, '--out', model, '--load-in-4bit'], /folder of the model itself/],
  ])('%s', (_, args, message) => {
    const { status, stderr, stdout } = halfbyte(args)
    expect({ status, stdout }).toEqual({ status: 2, stdout: '' })
    expect(stderr).toMatch(/^halfbyte: [^\n]+ \(ERR_HALFBYTE_USAGE\)\n$/)
    expect(stderr).toMatch(message)
  })
})

describe('what goes wrong later is said with exit status 1', () => {
  const broken = () => {
    writeFileSync(join(folder, 'config.json'), '{"model_type": "unheard_of"}')
    return folder
  }
  test.each([
    [
      'a folder that is not there',
      () => ['inspect', '/nowhere/model'],
      /\/nowhere\/model.*\(ERR_HALFBYTE_\w+\)/,
    ],
    ['an unknown family', () => ['inspect', broken()], /unheard_of.*\(ERR_HALFBYTE_CONFIG\)/],
    [
      'a text that is not there',
      () => ['eval', model, '--text', '/nowhere.txt'],
      /\/nowhere\.txt.*\(ENOENT\)/,
    ],
    [
      'a device that is not there',
      () => ['inspect', model, '--device', 'cuda:63'],
      /\(ERR_HALFBYTE_DEVICE\)/,
    ],
    [
      'nothing left to quantise',
      () => ['inspect', model, '--load-in-4bit', '--skip-modules', '*'],
      /NO_LINEAR/,
    ],
  ])('%s', (_, args, message) => {
    const { status, stderr } = halfbyte(args())
    expect(status).toBe(1)
    expect(stderr).toMatch(/^halfbyte: [^\n]+\n$/)
    expect(stderr).toMatch(message)
  })
})
