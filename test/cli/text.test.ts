import { HalfbyteError } from '../../lib/errors'
import { describeError } from '../../lib/cli/output'
import { Progress } from '../../lib/cli/progress'
import { formatBytes, formatSeconds, formatTable } from '../../lib/cli/table'

test('a table aligns text to the left and numbers to the right', () => {
  const text = formatTable(
    ['name', 'bytes', { title: 'note', align: 'right' }],
    [
      ['a', 5, 'x'],
      ['longer', '12.5 MB', undefined],
    ],
  )
  expect(text.split('\n')).toEqual([
    'name      bytes  note',
    '------  -------  ----',
    'a             5     x',
    'longer  12.5 MB     -',
  ])
})

test('a table without rows is its head', () => {
  expect(formatTable(['a', 'b'], [])).toBe('a  b\n-  -')
})

test.each([
  [0, '0 B'],
  [999, '999 B'],
  [1000, '1.00 kB'],
  [12_345_678, '12.3 MB'],
  [5e12, '5.00 TB'],
  [5e15, '5000.0 TB'],
])('formatBytes(%d) is %s', (bytes, text) => {
  expect(formatBytes(bytes)).toBe(text)
})

test.each([
  [0.00002, '20 us'],
  [0.25, '250 ms'],
  [2.25, '2.3 s'],
  [125, '2 min 5 s'],
])('formatSeconds(%d) is %s', (seconds, text) => {
  expect(formatSeconds(seconds)).toBe(text)
})

describe('describeError', () => {
  test('is one line with the code', () => {
    const error = new HalfbyteError(
      'ERR_HALFBYTE_CONFIG',
      'nothing to replace; kept were\n  a: head\n  b: tied',
    )
    expect(describeError(error)).toBe(
      'halfbyte: nothing to replace; kept were a: head b: tied (ERR_HALFBYTE_CONFIG)',
    )
  })

  test('takes the code of system errors', () => {
    const error = Object.assign(new Error('ENOENT: no such file, open x'), { code: 'ENOENT' })
    expect(describeError(error)).toBe('halfbyte: ENOENT: no such file, open x (ENOENT)')
  })

  test('shows the stack of anything else', () => {
    expect(describeError(new TypeError('oops'))).toContain('text.test')
  })
})

describe('Progress', () => {
  class Screen {
    text = ''
    constructor(readonly isTTY: boolean) {}
    write(chunk: string): boolean {
      this.text += chunk
      return true
    }
  }
  const on = (screen: Screen) => new Progress('Loading', screen as unknown as NodeJS.WriteStream)

  beforeEach(() => jest.useFakeTimers())
  afterEach(() => jest.useRealTimers())

  test('shows nothing for what takes less than a second', () => {
    const screen = new Screen(true)
    const progress = on(screen)
    progress.update(1, 2)
    progress.end()
    expect(screen.text).toBe('')
  })

  test('shows a bar after a second, and wipes it', () => {
    const screen = new Screen(true)
    const progress = on(screen)
    jest.advanceTimersByTime(1500)
    progress.update(1, 2)
    expect(screen.text).toContain('Loading [############............] 50%')
    progress.end()
    expect(screen.text.endsWith('\r\x1b[2K')).toBe(true)
  })

  test('is silent where there is no terminal', () => {
    const screen = new Screen(false)
    const progress = on(screen)
    jest.advanceTimersByTime(5000)
    progress.update(1, 2)
    progress.end()
    expect(screen.text).toBe('')
  })
})
