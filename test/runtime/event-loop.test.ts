/** Calls return at once and the event loop stays free while a device works. */
import { devices, ops, Tensor } from '../../lib/index'

describe.each(devices())('the event loop while %s works', (on) => {
  it('turns: many timers fire between the call and its promise', async () => {
    let ticks = 0
    const timer = setInterval(() => ticks++, 1)
    const [size, count] = on.type === 'cuda' ? [16_000_000, 2000] : [2_000_000, 60]
    let x = Tensor.full([size], 0.5, 'float32', on)
    for (let i = 0; i < count; i++) {
      const next = ops.activation(x, 'gelu')
      x.dispose()
      x = next
    }
    expect(ticks).toBe(0)
    const data = await x.data()
    clearInterval(timer)
    x.dispose()
    expect(data.length).toBe(size)
    expect(ticks).toBeGreaterThanOrEqual(20)
  })

  it('settles promises in the order of the queue', async () => {
    const settled: number[] = []
    using x = Tensor.full([100_000], 1, 'float32', on)
    const readings = Array.from({ length: 20 }, (_, i) => {
      const y = ops.activation(x, 'silu')
      const reading = y.data().then(() => settled.push(i))
      y.dispose()
      return reading
    })
    await Promise.all(readings)
    expect(settled).toEqual(Array.from({ length: 20 }, (_, i) => i))
  })
})
