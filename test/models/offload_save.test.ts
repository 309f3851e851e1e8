/** Saving models with parts on the disk: what others save, one tensor at a time in memory; and their state dicts. */
import { createHash } from 'node:crypto'
import { cpSync, readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { devices } from '../../lib'
import { load, logits } from '../support/causal_lm'
import { temporaryFolder } from '../support/files'
import { baselineMemory } from '../support/memory'
import { allowed, config, forms as commonForms } from '../support/offload'
import { readSafetensors } from '../support/safetensors'
import { writeTinyModel } from '../support/tiny_model'

const root = temporaryFolder()
const untied = writeTinyModel(join(root, 'untied'), config)
const tied = writeTinyModel(join(root, 'tied'), { ...config, tie_word_embeddings: true })
/** What is in a folder. */
const digests = (folder: string) =>
  Object.fromEntries(
    readdirSync(folder).map((name) => [
      name,
      createHash('sha256')
        .update(readFileSync(join(folder, name)))
        .digest('hex'),
    ]),
  )

const forms: typeof commonForms = [
  ...commonForms,
  [
    'fp4 in bfloat16',
    { loadIn4bit: true, bnb4bitQuantStorage: 'bfloat16', bnb4bitUseDoubleQuant: true, ...allowed },
  ],
]

describe.each(devices())('running on %s', (device) => {
  const main = device.name
  const place = main.replace(':', '')
  const onDisk = { 'model.embed_tokens': 'disk', 'model.layers': 'disk', lm_head: 'disk' }
  const deviceMap = { '': main, ...onDisk }

  describe.each(forms)('%s', (form, quantizationConfig) => {
    const name = `${form.replaceAll(' ', '-')}-${place}`
    const offloadFolder = join(root, `offload-${name}`)

    it.each([
      ['one file', untied, undefined],
      ['shards', untied, '300KB'],
      ['tied weights', tied, undefined],
    ])('saves what a model in memory saves: %s', async (_, source, maxShardSize) => {
      const shards = maxShardSize === undefined ? {} : { maxShardSize }
      const folders = ['whole', 'disk'].map((kind) =>
        join(root, `${kind}-${name}-${String(maxShardSize)}-${source === tied}`),
      ) as [string, string]
      using whole = await load(source, { device, quantizationConfig })
      await whole.savePretrained(folders[0], shards)
      using model = await load(source, { deviceMap, quantizationConfig, offloadFolder })
      await model.savePretrained(folders[1], shards)
      const wanted = digests(folders[0])
      expect(digests(folders[1])).toEqual(wanted)
      // from a checkpoint that is quantised already the weights come as it has them
      using again = await load(folders[1], { deviceMap, ...(quantizationConfig && { quantizationConfig }) })
      await again.savePretrained(folders[1], shards)
      expect(digests(folders[1])).toEqual(wanted)
      expect(await logits(again)).toEqual(await logits(whole))
    })

    it('takes no more memory for that than one tensor', async () => {
      using model = await load(untied, { deviceMap, quantizationConfig, offloadFolder })
      const largest = 300 * 256 * 4 + 512 * 256 * (quantizationConfig ? 1 : 4)
      const host = devices().find(({ type }) => type === 'cpu')!
      const before = [await baselineMemory(device), await baselineMemory(host)] as const
      const folder = join(root, `bounded-${name}`)
      await model.savePretrained(folder)
      expect(readSafetensors(join(folder, 'model.safetensors')).size).toBeGreaterThan(40)
      expect(host.memoryUsage().peak - before[1]).toBeLessThan(largest)
      if (main !== 'cpu') expect(device.memoryUsage().peak - before[0]).toBeLessThan(64 << 10)
    })

    it('has a state dict, what lies on the disk on the CPU', async () => {
      using whole = await load(tied, { device, quantizationConfig })
      using model = await load(tied, { deviceMap, quantizationConfig, offloadFolder })
      const [wanted, found] = [await whole.stateDict(), await model.stateDict()]
      expect([...found.keys()]).toEqual([...wanted.keys()])
      for (const [key, tensor] of wanted) {
        const own = found.get(key)!
        expect([key, own.shape, own.dtype]).toEqual([key, tensor.shape, tensor.dtype])
        const [ours, theirs] = [await own.data(), await tensor.data()]
        expect([key, Buffer.compare(new Uint8Array(ours.buffer), new Uint8Array(theirs.buffer))]).toEqual([
          key,
          0,
        ])
        if (/proj\.weight/.test(key)) expect([key, own.device.name]).toEqual([key, 'cpu'])
      }
      const [table, head] = ['model.embed_tokens.weight', 'lm_head.weight'].map((key) => found.get(key)!)
      expect(head!.storageId).toBe(table!.storageId)
      for (const tensor of [...wanted.values(), ...found.values()]) tensor.dispose()
    })
  })

  it('may be saved over what it is read from', async () => {
    const folder = join(root, `own-${place}`)
    cpSync(untied, folder, { recursive: true })
    using model = await load(folder, { deviceMap })
    model.to('bfloat16')
    const wanted = await logits(model)
    await model.savePretrained(folder, { maxShardSize: '300KB' })
    expect(await logits(model)).toEqual(wanted)
    using back = await load(folder, { device })
    expect(back.computeDtype).toBe('bfloat16')
    expect(await logits(back)).toEqual(wanted)
  })
})
