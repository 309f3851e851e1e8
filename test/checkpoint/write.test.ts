import { spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, promises, readFileSync, readdirSync, statSync } from 'node:fs'
import { join } from 'node:path'
import {
  AutoModelForCausalLM,
  BitsAndBytesConfig,
  CausalLM,
  Checkpoint,
  ConfigReader,
  devices,
  functional,
  getMemoryFootprint,
  onMeta,
  ops,
  replaceWithQuantizedLinear,
  saveStateDict,
  Tensor,
  writeSafetensors,
  type BitsAndBytesConfigOptions,
  type DType,
} from '../../lib'
import { readConfig } from '../../lib/checkpoint/config'
import { readSpec } from '../../lib/models/families'
import { ids } from '../support/causal_lm'
import { rejection } from '../support/errors'
import { root, temporaryFolder, temporaryFolders } from '../support/files'
import { goldenPath } from '../support/golden'
import { goldenModels } from '../support/golden_model'
import { itCompiled, printed, runScript } from '../support/run'
import { readSafetensors, type Stored } from '../support/safetensors'
import { writeTinyModel } from '../support/tiny_model'

const folder = temporaryFolder()
const fresh = temporaryFolders()

/** How many float32 values lie between two of one sign. */
function ulpsBetween(a: number, b: number): number {
  const [x, y] = new Int32Array(Float32Array.of(a, b).buffer)
  return Math.abs(x! - y!)
}

/** Golden models that bitsandbytes quantised, where what they were made from is there too. */
const plainOf = (name: string) => name.replace(/-bnb-.*/, '')
const quantisedWithPlain = goldenModels().filter(
  (name) => name !== plainOf(name) && goldenPath(`models/${plainOf(name)}`),
)

describe.each(devices())('writing from %s', (device) => {
  it.each(goldenModels())('gives the bytes that Python wrote: %s', async (name) => {
    const source = goldenPath(`models/${name}`)!
    const target = fresh()
    using model = await AutoModelForCausalLM.fromPretrained(source, { device })
    await model.savePretrained(target)
    const [ours, theirs] = [target, source].map((at) => readFileSync(join(at, 'model.safetensors')))
    expect(ours!.equals(theirs!)).toBe(true)
    const [a, b] = [target, source].map((at) => readFileSync(join(at, 'config.json'), 'utf8'))
    expect(a).toBe(b)
    expect(readdirSync(target).sort()).toEqual(['config.json', 'generation_config.json', 'model.safetensors'])
  })

  for (const name of quantisedWithPlain) {
    it(`gives what Python quantised to, from the plain model: ${name}`, async () => {
      const [source, plain] = [`models/${name}`, `models/${plainOf(name)}`].map((path) => goldenPath(path))
      const { raw } = readConfig(source!)
      using model = await AutoModelForCausalLM.fromPretrained(plain!, {
        device,
        quantizationConfig: BitsAndBytesConfig.fromJSON(raw['quantization_config']),
        dtype: raw['dtype'] as DType,
        // Python leaves them in 16 bits
        ...(name.startsWith('mixtral') && { modulesToNotConvert: ['experts'] }),
      })
      const target = fresh()
      await model.savePretrained(target)
      const [ours, theirs] = [target, source!].map((at) => readSafetensors(join(at, 'model.safetensors')))
      expect([...ours!.keys()]).toEqual([...theirs!.keys()])
      const bytes = ({ data }: Stored) => Buffer.from(data.buffer, data.byteOffset, data.byteLength)
      const state = (stored: Stored) => JSON.parse(bytes(stored).toString()) as { nested_offset?: number }
      for (const [key, wanted] of theirs!) {
        const own = ours!.get(key)!
        expect([key, own.dtype]).toEqual([key, wanted.dtype])
        if (key.includes('quant_state')) {
          // a mean, summed in another order
          const [a, b] = [state(own), state(wanted)]
          const offsets = [a.nested_offset ?? 0, b.nested_offset ?? 0] as const
          expect([key, ulpsBetween(...offsets) <= 2]).toEqual([key, true])
          expect({ ...a, nested_offset: 0 }).toEqual({ ...b, nested_offset: 0 })
          // and what is left of the absmax differs by as much
          const base = key.replace(/quant_state.*/, 'nested_absmax')
          const [x, y] = [ours!.get(base), theirs!.get(base)].map((stored) => stored?.data as Float32Array)
          const allowed = Math.abs(offsets[0] - offsets[1]) + 1e-9
          x?.forEach((value, i) => expect(Math.abs(value - y![i]!)).toBeLessThanOrEqual(allowed))
        } else if (key.endsWith('.absmax') && wanted.dtype === 'U8') {
          // so that one that lies between two codes may take the other
          const other = bytes(wanted)
          const differences = [...bytes(own)]
            .map((code, i) => Math.abs(code - other[i]!))
            .filter((d) => d > 0)
          expect([key, differences.length <= 1, Math.max(0, ...differences) <= 1]).toEqual([key, true, true])
        } else if (!key.endsWith('nested_absmax')) {
          expect([key, own.shape]).toEqual([key, wanted.shape])
          expect([key, bytes(own).equals(bytes(wanted))]).toEqual([key, true])
        }
      }
    })
  }

  for (const name of quantisedWithPlain.filter((each) => each.endsWith('-nf4'))) {
    it(`gives nested statistics to the last bit, given the offset: ${name}`, async () => {
      const theirs = readSafetensors(join(goldenPath(`models/${name}`)!, 'model.safetensors'))
      const { raw } = readConfig(goldenPath(`models/${name}`)!)
      const config = raw['quantization_config'] as Record<string, unknown>
      using model = await AutoModelForCausalLM.fromPretrained(goldenPath(`models/${plainOf(name)}`)!, {
        device,
        quantizationConfig: BitsAndBytesConfig.fromJSON({ ...config, bnb_4bit_use_double_quant: false }),
        dtype: raw['dtype'] as DType,
      })
      const state = await model.stateDict()
      const nested = [...theirs.keys()].filter((key) => key.endsWith('.nested_absmax'))
      expect(nested.length).toBeGreaterThan(0)
      for (const key of nested) {
        const base = key.replace(/nested_absmax$/, '')
        const { data } = theirs.get(`${base}quant_state.bitsandbytes__nf4`)!
        const text = Buffer.from(data.buffer, data.byteOffset, data.byteLength).toString()
        const { nested_offset: offset } = JSON.parse(text) as { nested_offset: number }
        using rest = ops.sub(state.get(`${base}absmax`)!, offset)
        const { codes, state: statistics } = functional.quantizeBlockwise(rest, { blocksize: 256 })
        expect([key, await codes.data()]).toEqual([key, theirs.get(`${base}absmax`)!.data])
        expect([key, await statistics.absmax.data()]).toEqual([key, theirs.get(key)!.data])
        for (const each of [codes, statistics]) each.dispose()
      }
      for (const tensor of state.values()) tensor.dispose()
    })
  }

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
    const index = JSON.parse(readFileSync(join(target, 'model.safetensors.index.json'), 'utf8')) as {
      metadata: object
      weight_map: object
    }
    const tensors = files.flatMap((name) => [...readSafetensors(join(target, name))])
    expect(index.metadata).toEqual({
      total_parameters: model.numParameters(),
      total_size: tensors.reduce((sum, [, { data }]) => sum + data.byteLength, 0),
    })
    expect(Object.keys(index.weight_map)).toEqual(tensors.map(([name]) => name).sort())
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
  const save = (through: string[], folder: string) => runScript('full-disk.js', [folder], [], { through })

  itCompiled('the older save stays whole: files that may not grow any further', async () => {
    const limited = ['bash', '-c', 'ulimit -f 2048; exec "$@"', 'bash']
    expect(await save(limited, fresh())).toEqual(
      printed(
        'HalfbyteError ERR_HALFBYTE_IO\n' +
          'model-00001-of-00009.safetensors was not written: the file would be larger than the process or the file ' +
          'system allows (EFBIG). What was there before is untouched\n' +
          '10 files, as before: true\n',
      ),
    )
  })

  const full = fresh()
  mkdirSync(full)
  const onSmallDisk = [
    'unshare',
    '-rm',
    'bash',
    '-c',
    'mount -t tmpfs -o size=8m tmpfs "$0" && exec "$@"',
    full,
  ]
  const [probe, ...rest] = onSmallDisk
  const mounts = spawnSync(probe!, [...rest, 'true']).status === 0
  const itMounts = mounts ? itCompiled : it.skip
  itMounts(`the older save stays whole: a full disk${mounts ? '' : ' (no right to mount one)'}`, async () => {
    const result = await save(onSmallDisk, full)
    expect(result).toEqual(printed(result.stdout))
    expect(result.stdout).toMatch(
      /^HalfbyteError ERR_HALFBYTE_IO\nmodel-0000\d-of-00009.safetensors was not written: the disk is full \(ENOSPC\)/,
    )
    expect(result.stdout).toContain('10 files, as before: true')
  })

  it('at the last of several files, none is replaced and nothing is left over', async () => {
    const target = fresh()
    using model = await AutoModelForCausalLM.fromPretrained(writeTinyModel(fresh()), { device: 'cpu' })
    await model.savePretrained(target)
    const content = () => readdirSync(target).map((name) => [name, readFileSync(join(target, name))])
    const before = content()
    // what a save copies along cannot be read: a folder is in its place
    mkdirSync(join(model.folder!, 'tokenizer.json'))
    const error = await rejection(model.savePretrained(target, { maxShardSize: 50_000 }))
    expect(error.code).toBe('ERR_HALFBYTE_IO')
    expect(error.message).toMatch(/tokenizer.json was not written: EISDIR/)
    expect(content()).toEqual(before)
  })

  it('two saves into one folder at a time leave one of them', async () => {
    const target = fresh()
    const save = async (value: number) => {
      using tensor = Tensor.full([100_000], value)
      await saveStateDict(target, new Map([['x', tensor]]))
    }
    await Promise.all([1, 2, 3, 4].map(save))
    expect(readdirSync(target)).toEqual(['model.safetensors'])
    const { data } = readSafetensors(join(target, 'model.safetensors')).get('x')!
    expect(new Set(data as Float32Array).size).toBe(1)
  })

  it('the names are not flushed where the folder may not be read: the save is done', async () => {
    const target = fresh()
    using tensor = Tensor.full([4], 1)
    const { open } = promises
    const refuse = jest.spyOn(promises, 'open').mockImplementation((path, ...rest) => {
      return path === target ? Promise.reject(new Error('EACCES')) : open(path, ...rest)
    })
    try {
      await saveStateDict(target, new Map([['x', tensor]]))
      expect(refuse).toHaveBeenCalledWith(target, 'r')
    } finally {
      refuse.mockRestore()
    }
    expect(readdirSync(target)).toEqual(['model.safetensors'])
  })

  it.each([
    ['in a file', () => join(__dirname, 'write.test.ts', 'x'), /ENOTDIR|EEXIST/],
    ['that is a file', () => join(__dirname, 'write.test.ts'), /EEXIST/],
    ['where none can be made', () => '/proc/x/y', /\/proc\/x was not written: (ENOENT|EACCES|EROFS)/],
    ['with no name', () => '', /ENOENT/],
    ['with an impossible name', () => `${fresh()}\0`, /is not the path/],
    ['of an endless name', () => fresh() + 'x'.repeat(300), /ENAMETOOLONG/],
  ])('a folder %s is named', async (_, place, message) => {
    using model = await AutoModelForCausalLM.fromPretrained(writeTinyModel(fresh()), { device: 'cpu' })
    for (const save of [() => saveStateDict(place(), new Map()), () => model.savePretrained(place())]) {
      const error = await rejection(save())
      expect(error.code).toMatch(/ERR_HALFBYTE_(IO|VALUE)/)
      expect(error.message).toMatch(message)
    }
  })

  it('because the model changes meanwhile, it says so', async () => {
    const target = fresh()
    using model = await AutoModelForCausalLM.fromPretrained(writeTinyModel(fresh()), { device: 'cpu' })
    await model.savePretrained(target)
    const before = readdirSync(target).map((name) => readFileSync(join(target, name)))
    const error = await rejection(
      model.savePretrained(target, { onProgress: () => void model.to('bfloat16') }),
    )
    expect(error.code).toBe('ERR_HALFBYTE_USAGE')
    expect(error.message).toMatch(/model.safetensors: .* has become bfloat16 .* while it was saved/)
    expect(readdirSync(target).map((name) => readFileSync(join(target, name)))).toEqual(before)
  })

  it('because nothing is loaded, it says so', async () => {
    const { raw, file } = readConfig(writeTinyModel(fresh()))
    const config = new ConfigReader(raw, file)
    const model = onMeta(() => new CausalLM(readSpec(config), config))
    expect((await rejection(model.savePretrained(fresh()))).code).toBe('ERR_HALFBYTE_STATE_DICT')
    replaceWithQuantizedLinear(model, { loadIn4bit: true })
    expect((await rejection(model.stateDict())).code).toBe('ERR_HALFBYTE_STATE_DICT')
    expect((await rejection(model.model.layers.at(0)!.stateDict())).code).toBe('ERR_HALFBYTE_STATE_DICT')
  })

  it('or is aborted, it rejects with the reason', async () => {
    const target = fresh()
    using model = await AutoModelForCausalLM.fromPretrained(writeTinyModel(fresh()), { device: 'cpu' })
    const reason = new Error('enough')
    await expect(model.savePretrained(target, { signal: AbortSignal.abort(reason) })).rejects.toBe(reason)
    expect(readdirSync(target)).toEqual([])
  })

  it('because it is given what is no state dict, it says so, and nothing is written', async () => {
    const tensor = Tensor.zeros([1], 'float32', 'cpu')
    const reserved = new Map([['__metadata__', tensor]])
    for (const state of [undefined, { weight: tensor }, [1], new Map([['weight', 5]]), reserved]) {
      const path = fresh()
      const error = await rejection(writeSafetensors(`${path}.safetensors`, state as Map<string, Tensor>))
      expect(error.code).toBe('ERR_HALFBYTE_VALUE')
      expect((await rejection(saveStateDict(path, state as Map<string, Tensor>))).code).toBe(error.code)
      expect(existsSync(`${path}.safetensors`)).toBe(false)
    }
  })

  it('or a size makes no sense', async () => {
    await expect(saveStateDict(fresh(), new Map(), { maxShardSize: '5 apples' })).rejects.toThrow(
      /not a size/,
    )
  })
})
