import { getEventListeners } from 'node:events'
import { abortable } from '../../lib/abortable'

const never = () => new Promise<number>(() => undefined)

describe('abortable', () => {
  it('has one listener however many wait, and none when nobody does', async () => {
    const { signal } = new AbortController()
    const listeners = () => getEventListeners(signal, 'abort').length
    const settle: ((n: number) => void)[] = []
    const all = Array.from({ length: 50 }, () =>
      abortable(new Promise<number>((resolve) => settle.push(resolve)), signal),
    )
    expect(listeners()).toBe(1)
    settle.forEach((resolve, i) => resolve(i))
    expect(await Promise.all(all)).toEqual(Array.from({ length: 50 }, (_, i) => i))
    await new Promise(setImmediate)
    expect(listeners()).toBe(0)
    const again = abortable(Promise.resolve(1), signal)
    expect(listeners()).toBe(1)
    expect(await again).toBe(1)
  })

  it('rejects all who wait, and those who come later, with the reason', async () => {
    const controller = new AbortController()
    const reason = new Error('enough')
    const waiting = [0, 1, 2].map(() => abortable(never(), controller.signal))
    controller.abort(reason)
    for (const each of [...waiting, abortable(never(), controller.signal)])
      await expect(each).rejects.toBe(reason)
  })

  it('passes a failure on, and leaves other signals alone', async () => {
    const [one, other] = [new AbortController(), new AbortController()]
    const waits = abortable(Promise.resolve(3), other.signal)
    const fails = abortable(Promise.reject(new Error('mine')), one.signal)
    one.abort()
    await expect(fails).rejects.toThrow()
    expect(await waits).toBe(3)
  })
})
