import { readFileSync, readdirSync, statSync, writeFileSync } from 'node:fs'
import type { FileHandle } from 'node:fs/promises'
import { join } from 'node:path'
import {
  AutoModelForCausalLM,
  Checkpoint,
  devices,
  getMemoryFootprint,
  saveStateDict,
  Tensor,
  writeSafetensors,
  type BitsAndBytesConfigOptions,
} from '../../lib'
import { writeAtomically } from '../../lib/checkpoint/write'
import { root, temporaryFolder } from '../support/files'
import { goldenSubset } from '../support/golden'
import { readSafetensors } from '../support/safetensors'
import { writeTinyModel } from '../support/tiny_model'

const folder = temporaryFolder()
let made = 0
const fresh = () => join(folder, String(made++))
const ids = [3, 1, 4, 1, 5, 9, 2, 6]

describe.each(devices())('writing from %s', (device) => {
  it.each(['llama', 'llama-bnb-nf4', 'llama-bnb-fp4', 'llama-bnb-int8'])(
    'gives the bytes that Python wrote: %s',
    async (name) => {
      const source = join(goldenSubset, 'models', name)
      const target = fresh()
      using model = await AutoModelForCausalLM.fromPretrained(source, { device })
      await model.savePretrained(target)
      const [ours, theirs] = [target, source].map((at) => readFileSync(join(at, 'model.safetensors')))
      expect(ours!.equals(theirs!)).toBe(true)
      const [a, b] = [target, source].map(
        (at) => JSON.parse(readFileSync(join(at, 'config.json'), 'utf8')) as object,
      )
      expect(a).toEqual(b)
      expect(readdirSync(target).sort()).toEqual([
        'config.json',
        'generation_config.json',
        'model.safetensors',
      ])
    },
  )

  it.each<[string, BitsAndBytesConfigOptions | undefined]>([
    ['float32', undefined],
    ['nf4', { loadIn4bit: true, bnb4bitQuantType: 'nf4' }],
    ['fp4 double', { loadIn4bit: true, bnb4bitUseDoubleQuant: true, bnb4bitQuantStorage: 'bfloat16' }],
    ['int8', { loadIn8bit: true }],
  ])('gives a folder that loads to the same model: %s', async (_, quantizationConfig) => {
    const target = fresh()
    const source = join(root, 'models', 'tinypy-2m')
    using model = await AutoModelForCausalLM.fromPretrained(source, { device, quantizationConfig })
    await model.savePretrained(target, { maxShardSize: '1MB' })
    const files = readdirSync(target).filter((name) => name.endsWith('.safetensors'))
    expect(files.length).toBeGreaterThan(1)
    expect(files[0]).toBe(`model-00001-of-0000${files.length}.safetensors`)
    // the embedding is larger than a shard and has one to itself
    expect(files.filter((name) => statSync(join(target, name)).size > 1.1e6).length).toBeLessThanOrEqual(1)
    using again = await AutoModelForCausalLM.fromPretrained(target, { device })
    expect(again.quantizationConfig?.toJSON()).toEqual(model.quantizationConfig?.toJSON())
    expect(getMemoryFootprint(again)).toBe(getMemoryFootprint(model))
    expect(again.tokenizer).toBeDefined()
    using a = model.forward(ids)
    using b = again.forward(ids)
    expect(await b.data()).toEqual(await a.data())
  })

  it('drops shards of an older save, and its index', async () => {
    const target = fresh()
    using model = await AutoModelForCausalLM.fromPretrained(writeTinyModel(fresh()), { device })
    await model.savePretrained(target, { maxShardSize: 50_000 })
    expect(readdirSync(target).length).toBeGreaterThan(3)
    await model.savePretrained(target)
    expect(readdirSync(target).sort()).toEqual(['config.json', 'model.safetensors'])
    await model.savePretrained(target, { maxShardSize: 50_000 })
    expect(readdirSync(target)).not.toContain('model.safetensors')
    using again = Checkpoint.open(target)
    expect(again.files.length).toBeGreaterThan(1)
  })

  it('orders tensors by dtype and name, and pads the header', async () => {
    const tensors = new Map([
      ['z', Tensor.from(Uint8Array.of(1, 2, 3), { device })],
      ['b', Tensor.from([1.5], { dtype: 'bfloat16', device })],
      ['é', Tensor.from([1, 2], { device })],
      ['a', Tensor.from(Int8Array.of(-1), { device })],
      ['10', Tensor.from([3], { device })],
      ['none', Tensor.empty([0, 3], 'float32', device)],
      ['long', Tensor.from(BigInt64Array.of(5n), { shape: [], device })],
    ])
    const path = join(folder, 'ordered.safetensors')
    await writeSafetensors(path, tensors)
    const file = readFileSync(path)
    expect(Number(file.readBigUInt64LE(0)) % 8).toBe(0)
    const text = file.toString('utf8')
    const order = ['"__metadata__":{"format":"pt"}', '"long"', '"10"', '"none"', '"é"', '"b"', '"a"', '"z"']
    const places = order.map((name) => text.indexOf(name))
    expect(places).toEqual([...places].sort((x, y) => x - y))
    expect(readSafetensors(path).get('é')!.data).toEqual(Float32Array.of(1, 2))
    for (const tensor of tensors.values()) tensor.dispose()
  })

  it('writes tied tensors once', async () => {
    using table = Tensor.from([1, 2, 3], { device })
    using alias = table.share()
    const target = fresh()
    await saveStateDict(
      target,
      new Map([
        ['first', table],
        ['second', alias],
      ]),
    )
    expect([...readSafetensors(join(target, 'model.safetensors')).keys()]).toEqual(['first'])
  })
})

describe('when writing fails', () => {
  it('the old file stays whole, nothing is left over, and the error says what to do', async () => {
    const target = fresh()
    using tensor = Tensor.from([1, 2, 3])
    await saveStateDict(target, new Map([['x', tensor]]))
    const path = join(target, 'model.safetensors')
    const before = readFileSync(path)
    const full = Object.assign(new Error('ENOSPC: no space left on device, write'), { code: 'ENOSPC' })
    const failing = writeAtomically(path, async (file: FileHandle) => {
      await file.write(Buffer.from('half of it'))
      throw full
    })
    await expect(failing).rejects.toMatchObject({
      code: 'ERR_HALFBYTE_IO',
      message: expect.stringMatching(/model.safetensors was not written: the disk is full/) as string,
    })
    expect(readFileSync(path)).toEqual(before)
    expect(readdirSync(target)).toEqual(['model.safetensors'])
  })

  it('a place that is not there, or not a folder, is named', async () => {
    const failing = writeAtomically(join(fresh(), 'x'), async () => undefined)
    await expect(failing).rejects.toMatchObject({ code: 'ERR_HALFBYTE_IO' })
    const file = fresh()
    writeFileSync(file, '')
    await expect(saveStateDict(file, new Map())).rejects.toThrow(/EEXIST|ENOTDIR/)
  })

  it('or is aborted, it rejects with the reason', async () => {
    const target = fresh()
    using model = await AutoModelForCausalLM.fromPretrained(writeTinyModel(fresh()), { device: 'cpu' })
    const reason = new Error('enough')
    await expect(model.savePretrained(target, { signal: AbortSignal.abort(reason) })).rejects.toBe(reason)
    expect(readdirSync(target)).toEqual([])
  })

  it('or a size makes no sense', async () => {
    await expect(saveStateDict(fresh(), new Map(), { maxShardSize: '5 apples' })).rejects.toThrow(
      /not a size/,
    )
  })
})
