/** The addon under arguments that make no sense: always an error with a code, never a crash. */
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { DTYPES, systemInfo } from '../../lib/index'
import { native } from '../../lib/native'
import { temporaryFolder } from '../support/files'

const folder = temporaryFolder()

/** The code (or for lack of one the name) of what a call throws or rejects with, or 'ok'. */
async function outcome(fn: () => unknown): Promise<string> {
  try {
    await fn()
    return 'ok'
  } catch (error) {
    const { code, name } = error as { code?: string; name: string }
    return code ?? name
  }
}

describe('the binding', () => {
  const cpu = native.device('cpu')

  it('says what it is', () => {
    expect(native.version).toMatch(/^\d+\.\d+\.\d+/)
    expect(native.devices()[0]).toBe('cpu')
    expect(new Set(native.ops).size).toBe(native.ops.length)
    const { isa, threads } = native.cpuInfo()
    expect(['plain', 'avx2', 'avx512']).toContain(isa)
    expect(threads).toBeGreaterThanOrEqual(1)
    const { cuda, devices } = systemInfo()
    expect(cuda.reason === '').toBe(devices.some((name) => name.startsWith('cuda')))
  })

  it('has the codebooks of the formats', () => {
    for (const [name, length] of Object.entries({ nf4: 16, fp4: 16, dynamic: 256, dynamic_unsigned: 256 })) {
      const book = native.codebook(name)
      expect(book).toHaveLength(length)
      expect(Math.max(...book)).toBe(1)
    }
    const nf4 = native.codebook('nf4')
    expect([...nf4]).toEqual([...nf4].sort((a, b) => a - b))
    expect(nf4[7]).toBe(0)
  })

  it('knows the dtypes by the numbers of the library', () => {
    for (const { id, bytes } of Object.values(DTYPES)) {
      const t = cpu.empty(id, [3])
      expect(t.storageBytes).toBe(3 * bytes)
      t.dispose()
    }
  })

  it('checks every argument of every call', async () => {
    const path = join(folder, 'bytes.bin')
    writeFileSync(path, Buffer.alloc(100))
    const file = native.openFile(path)
    const tensor = cpu.empty(0, [4, 4])
    const gone = cpu.empty(0, [4])
    gone.dispose()
    cpu.beginCapture()
    const graph = cpu.endCapture()

    const odd: unknown[] = [undefined, null, NaN, -1, 1.5, 2 ** 53, 1e300, 'x', '', true, {}, [], [1, 'a']]
    odd.push([-1], [NaN], [1e18, 1e18], new Array(7).fill(1), Symbol('s'), 10n, () => 1, new Date(), /x/)
    odd.push(new Uint8Array(3), new ArrayBuffer(4), gone, tensor, cpu, file, graph, Object.create(tensor))
    odd.push(new Proxy([1], { get: () => { throw new RangeError('trap') } })) // prettier-ignore
    odd.push({ get length() { throw new RangeError('getter') } }) // prettier-ignore
    const calls = [
      ...['empty', 'fromHost', 'run', 'read', 'write', 'copyFrom'].map((name) => [cpu, name]),
      [tensor, 'view'],
      ...['bytes', 'tensor'].map((name) => [file, name]),
      ...['device', 'codebook', 'openFile'].map((name) => [native, name]),
    ] as [Record<string, (...args: unknown[]) => unknown>, string][]
    const good: Record<string, unknown[]> = {
      empty: [0, [2]],
      fromHost: [0, [1], new Float32Array(1), true],
      run: [0, [tensor], [], [1]],
      read: [tensor],
      write: [tensor, new Float32Array(16)],
      copyFrom: [tensor],
      view: [0, [2], [1], 0],
      bytes: [0, 10],
      tensor: [cpu, 4, [10], 0],
      device: ['cpu'],
      codebook: ['nf4'],
      openFile: [path],
    }
    let refused = 0
    for (const [object, name] of calls) {
      const right = good[name]!
      expect(await outcome(() => object[name]!(...right))).toBe('ok')
      expect(await outcome(() => object[name]!())).toMatch(/^ERR_HALFBYTE_/)
      for (let position = 0; position < right.length; position++) {
        for (const value of odd) {
          const args = right.with(position, value)
          const result = await outcome(() => object[name]!(...args))
          if (result === 'ok') continue
          refused++
          // the RangeError of a trap is passed on as it is
          expect(result).toMatch(/^(ERR_HALFBYTE_|RangeError)/)
        }
      }
      for (const receiver of [
        undefined,
        null,
        5,
        {},
        gone,
        tensor,
        cpu,
        file,
        graph,
        Object.create(object),
      ]) {
        if (receiver === object || object === (native as unknown)) continue
        expect(await outcome(() => object[name]!.apply(receiver, right))).toMatch(
          /^(ERR_HALFBYTE_|TypeError)/,
        )
      }
    }
    expect(refused).toBeGreaterThan(400)
    expect(await outcome(() => new (tensor.constructor as new () => unknown)())).toBe('ERR_HALFBYTE_USAGE')
    expect(await outcome(() => Reflect.construct(cpu.constructor, [], tensor.constructor))).toBe(
      'ERR_HALFBYTE_USAGE',
    )
    await cpu.synchronize()
    file.close()
    graph.dispose()
    tensor.dispose()
  })

  it('keeps views inside of their storage', async () => {
    const t = cpu.empty(0, [4, 4])
    const view = (shape: number[], strides: number[], offset: number, dtype = 0) =>
      outcome(() => t.view(dtype, shape, strides, offset))
    expect(await view([16], [1], 0)).toBe('ok')
    expect(await view([17], [1], 0)).toBe('ERR_HALFBYTE_SHAPE')
    expect(await view([16], [1], 1)).toBe('ERR_HALFBYTE_SHAPE')
    expect(await view([4], [5], 0)).toBe('ok')
    expect(await view([4], [5], 1)).toBe('ERR_HALFBYTE_SHAPE')
    expect(await view([8], [1], 0, 6)).toBe('ok')
    expect(await view([9], [1], 0, 6)).toBe('ERR_HALFBYTE_SHAPE')
    expect(await view([0, 99], [1e6, 1], 16)).toBe('ok')
    expect(await view([0], [1], 17)).toBe('ERR_HALFBYTE_SHAPE')
    expect(await view([1e6, 1e6], [0, 0], 15)).toBe('ok')
    expect(await view([2 ** 40, 2 ** 40], [0, 0], 0)).toBe('ERR_HALFBYTE_SHAPE')
    expect(await view([2 ** 50, 2], [2 ** 50, 1], 0)).toBe('ERR_HALFBYTE_SHAPE')
    expect(await view([2], [2 ** 53 - 1], 0)).toBe('ERR_HALFBYTE_SHAPE')
    t.dispose()
  })

  it('checks the operands of every op by number and kind', async () => {
    const t = cpu.empty(0, [4])
    for (const [id, name] of native.ops.entries()) {
      expect([name, await outcome(() => cpu.run(id, [], [], []))]).toEqual([name, 'ERR_HALFBYTE_VALUE'])
      expect([name, await outcome(() => cpu.run(id, [null], [null], [NaN]))]).toEqual([
        name,
        expect.stringMatching(/VALUE|SHAPE/),
      ])
      const many = new Array<typeof t>(10).fill(t)
      expect([name, await outcome(() => cpu.run(id, many, many, []))]).toEqual([name, 'ERR_HALFBYTE_SHAPE'])
    }
    expect(await outcome(() => cpu.run(native.ops.length, [t], [t], []))).toBe('ERR_HALFBYTE_UNSUPPORTED')
    t.dispose()
  })
})
