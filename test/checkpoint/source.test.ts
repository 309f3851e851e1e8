import { mkdirSync, symlinkSync, truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { Checkpoint, devices, HalfbyteError, SafetensorsFile } from '../../lib'
import { temporaryFolder } from '../support/files'
import { rawSafetensors, writeSafetensors, type Stored } from '../support/safetensors'

const folder = temporaryFolder()
let made = 0
/** A fresh folder with these files. */
function folderWith(files: Record<string, object | Uint8Array | Record<string, Stored>>): string {
  const path = join(folder, String(made++))
  mkdirSync(path)
  for (const [name, content] of Object.entries(files)) {
    const file = join(path, name)
    if (content instanceof Uint8Array) writeFileSync(file, content)
    else if (name.endsWith('.json')) writeFileSync(file, JSON.stringify(content))
    else writeSafetensors(file, new Map(Object.entries(content as Record<string, Stored>)))
  }
  return path
}

const f32 = (...values: number[]): Stored => ({
  dtype: 'F32',
  shape: [values.length],
  data: Float32Array.from(values),
})
const index = (map: object) => ({ 'model.safetensors.index.json': { weight_map: map } })

function problem(fn: () => unknown): string {
  try {
    fn()
  } catch (error) {
    expect(error).toBeInstanceOf(HalfbyteError)
    expect((error as HalfbyteError).code).toBe('ERR_HALFBYTE_CHECKPOINT')
    return (error as HalfbyteError).message
  }
  throw new Error('nothing was thrown')
}

describe.each(devices())('tensors of a file on %s', (device) => {
  const values: Record<string, Stored> = {
    odd: { dtype: 'U8', shape: [3], data: Uint8Array.of(1, 2, 3) },
    floats: { dtype: 'F32', shape: [2, 2], data: Float32Array.of(1, -2, 3.5, 1e-30) },
    halves: { dtype: 'BF16', shape: [3, 1], data: Uint16Array.of(0x3f80, 0x4000, 0xc040) },
    f16: { dtype: 'F16', shape: [1], data: Uint16Array.of(0x3c00) },
    bytes: { dtype: 'I8', shape: [2], data: Int8Array.of(-128, 127) },
    ints: { dtype: 'I32', shape: [2], data: Int32Array.of(-5, 2 ** 30) },
    longs: { dtype: 'I64', shape: [], data: BigInt64Array.of(-(2n ** 60n)) },
    none: { dtype: 'F32', shape: [0, 4], data: new Float32Array(0) },
    doubles: { dtype: 'F64', shape: [1], data: Float64Array.of(1) },
  }
  const path = folderWith({ 'model.safetensors': values })

  it('have the dtype, shape and bits of the file, at whatever address', async () => {
    using file = SafetensorsFile.open(join(path, 'model.safetensors'))
    for (const [name, { shape, data }] of Object.entries(values)) {
      if (name === 'doubles') continue
      using tensor = file.tensor(name, device)
      expect(tensor.shape).toEqual(shape)
      expect(tensor.device).toBe(device)
      expect(await tensor.data()).toEqual(data)
    }
    expect(file.bytes('odd')).toEqual(Uint8Array.of(1, 2, 3))
  })

  it('say so when they cannot be had', () => {
    using file = SafetensorsFile.open(join(path, 'model.safetensors'))
    expect(problem(() => file.tensor('doubles', device))).toMatch(
      /"doubles" is F64; halfbyte computes with F32/,
    )
    expect(problem(() => file.tensor('nothing', device))).toMatch(/no tensor "nothing"/)
    file.close()
    expect(() => file.tensor('odd', device)).toThrow(/closed/)
  })

  it('reject when the file shrinks after it was opened', async () => {
    const path = join(
      folderWith({ 'model.safetensors': { x: f32(...new Array<number>(5000).fill(1)) } }),
      'model.safetensors',
    )
    using file = SafetensorsFile.open(path)
    truncateSync(path, 8000)
    using tensor = file.tensor('x', device)
    await expect(tensor.data()).rejects.toMatchObject({ code: 'ERR_HALFBYTE_IO' })
  })
})

describe('a folder', () => {
  it('with one file', () => {
    using checkpoint = Checkpoint.open(folderWith({ 'model.safetensors': { b: f32(1), a: f32(2, 3) } }))
    expect([...checkpoint.tensors.keys()]).toEqual(['b', 'a'])
    expect(checkpoint.totalBytes).toBe(12)
  })

  it('with shards', async () => {
    const path = folderWith({
      'one.safetensors': { a: f32(1) },
      'two.safetensors': { b: f32(2), c: f32(3) },
      ...index({ a: 'one.safetensors', b: 'two.safetensors', c: 'two.safetensors' }),
    })
    using checkpoint = Checkpoint.open(path)
    expect([...checkpoint.tensors.keys()]).toEqual(['a', 'b', 'c'])
    expect(await checkpoint.tensor('c', 'cpu').data()).toEqual(Float32Array.of(3))
    expect(checkpoint.info('c').file).toBe(join(path, 'two.safetensors'))
  })

  it('with shards that hold more than the index lists', () => {
    const path = folderWith({
      'one.safetensors': { w: f32(1) },
      'two.safetensors': { 'w.absmax': f32(2), w: f32(5) },
      ...index({ w: 'one.safetensors', x: 'two.safetensors' }),
    })
    expect(problem(() => Checkpoint.open(path))).toMatch(/x \(in two.safetensors\)/)
    const good = folderWith({
      'one.safetensors': { w: f32(1) },
      'two.safetensors': { 'w.absmax': f32(2), w: f32(5), x: f32(0) },
      ...index({ w: 'one.safetensors', x: 'two.safetensors' }),
    })
    using checkpoint = Checkpoint.open(good)
    expect(checkpoint.has('w.absmax')).toBe(true)
    expect(checkpoint.info('w').file).toContain('one')
  })

  it('through symbolic links, as a download cache has them', () => {
    const target = folderWith({ 'blob.safetensors': { a: f32(1) } })
    const path = folderWith({})
    symlinkSync(join(target, 'blob.safetensors'), join(path, 'model.safetensors'))
    using checkpoint = Checkpoint.open(path)
    expect(checkpoint.has('a')).toBe(true)
  })

  it.each<[string, Parameters<typeof folderWith>[0], RegExp]>([
    ['nothing in it', {}, /neither model.safetensors nor model.safetensors.index.json/],
    ['a pickle only', { 'pytorch_model.bin': Buffer.of(1) }, /pytorch_model.bin is a pickle/],
    ['a broken file', { 'model.safetensors': rawSafetensors('{"a":') }, /not JSON/],
    ['an empty file', { 'model.safetensors': Buffer.alloc(0) }, /0 bytes are too few/],
    [
      'missing shards',
      index({ a: 'x.safetensors', b: 'y.safetensors' }),
      /names 2 shards that are not there: x.safetensors, y.safetensors/,
    ],
    [
      'a tensor that its shard does not have',
      { 'x.safetensors': { b: f32(1) }, ...index({ a: 'x.safetensors' }) },
      /1 tensor .*a \(in x.safetensors\)/,
    ],
    [
      'a tensor in two shards and not in the index',
      {
        'x.safetensors': { a: f32(1), t: f32(1) },
        'y.safetensors': { b: f32(1), t: f32(1) },
        ...index({ a: 'x.safetensors', b: 'y.safetensors' }),
      },
      /"t" lies in x.safetensors too/,
    ],
    ['an index without a map', { 'model.safetensors.index.json': {} }, /no weight_map/],
    ['an index that is no JSON', { 'model.safetensors.index.json': Buffer.from('{') }, /not JSON/],
    [
      'a path out of the folder',
      index({ a: '../model.safetensors' }),
      /"\.\.\/model.safetensors", which is not a plain file name/,
    ],
    ['an absolute path', index({ a: '/etc/passwd' }), /not a plain file name/],
    ['a path of the other kind', index({ a: '..\\model.safetensors' }), /not a plain file name/],
    ['the folder above', index({ a: '..' }), /not a plain file name/],
    ['a number for a shard', index({ a: 5 }), /not a plain file name/],
  ])('with %s', (_, files, message) => {
    expect(problem(() => Checkpoint.open(folderWith(files)))).toMatch(message)
  })

  it('that is not there', () => {
    expect(problem(() => Checkpoint.open(join(folder, 'nowhere')))).toMatch(/no such file or folder/)
    expect(problem(() => SafetensorsFile.open(folder))).toMatch(/is not a file/)
  })
})
