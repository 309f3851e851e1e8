import { checkCount, helpText, parse, type Command } from '../../lib/cli/command'

const sample: Command = {
  name: 'sample',
  summary: 'Does nothing.',
  arguments: 'DIR',
  count: [1, 1],
  options: [
    [
      'Options',
      {
        number: { value: 'N', help: 'a number' },
        kind: { value: 'a|b', help: 'one of two' },
        list: { value: 'X', help: 'many', multiple: true },
        loud: { short: 'l', help: 'a switch' },
      },
    ],
  ],
  run: async () => undefined,
}

const flagsOf = (...args: string[]) => parse(sample, args).flags

describe('options of a command', () => {
  test('are read by type', () => {
    const { positionals, flags } = parse(sample, [
      'dir',
      '--number',
      '2.5',
      '-l',
      '--list=a',
      '--list',
      'b',
      '--kind',
      'a',
    ])
    expect(positionals).toEqual(['dir'])
    expect(flags.number('number')).toBe(2.5)
    expect(flags.switch('loud')).toBe(true)
    expect(flags.texts('list')).toEqual(['a', 'b'])
    expect(flags.choice('kind', ['a', 'b'])).toBe('a')
  })

  test('that are absent are undefined, false or empty', () => {
    const flags = flagsOf()
    expect(flags.number('number')).toBeUndefined()
    expect(flags.switch('loud')).toBe(false)
    expect(flags.texts('list')).toEqual([])
    expect(flags.has('kind')).toBe(false)
  })

  test.each([
    ['unknown option', ['--nope']],
    ['missing value', ['--number']],
    ['value for a switch', ['--loud=yes']],
  ])('%s is a usage error that names the command', (_, args) => {
    expect(() => parse(sample, args)).toThrow(
      expect.objectContaining({
        code: 'ERR_HALFBYTE_USAGE',
        message: expect.stringContaining('halfbyte sample --help'),
      }),
    )
  })

  test.each([
    ['text', 'x', {}],
    ['nothing', ' ', {}],
    ['infinity', 'Infinity', {}],
    ['too small', '-1', { min: 0 }],
    ['too large', '2', { max: 1 }],
    ['a fraction', '1.5', { whole: true }],
  ])('a number that is %s is refused', (_, value, range) => {
    expect(() => flagsOf(`--number=${value}`).number('number', range)).toThrow(
      expect.objectContaining({ code: 'ERR_HALFBYTE_USAGE', message: expect.stringContaining('--number') }),
    )
  })

  test('a choice outside of the list names the list', () => {
    expect(() => flagsOf('--kind=c').choice('kind', ['a', 'b'])).toThrow('--kind is "c"; it may be a, b')
  })

  test('positional arguments are counted', () => {
    expect(() => checkCount(sample, [])).toThrow('something is missing')
    expect(() => checkCount(sample, ['a', 'b'])).toThrow('b is too much')
    expect(() => checkCount(sample, ['a'])).not.toThrow()
  })

  test('the help text lists every option', () => {
    const text = helpText(sample)
    expect(text).toContain('halfbyte sample DIR')
    for (const option of ['--number N', '--kind a|b', '--list X', '-l, --loud'])
      expect(text).toContain(option)
  })
})
