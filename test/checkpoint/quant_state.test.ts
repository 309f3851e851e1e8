/** Checkpoints whose packed weights say nonsense about themselves: every one an error that names the layer. */
import { copyFileSync, mkdirSync } from 'node:fs'
import { join } from 'node:path'
import { AutoModelForCausalLM, devices } from '../../lib'
import { rejection } from '../support/errors'
import { temporaryFolder } from '../support/files'
import { goldenSubset } from '../support/golden'
import { readSafetensors, writeSafetensors, type Stored } from '../support/safetensors'

const folder = temporaryFolder()
let made = 0
const layer = 'model.layers.1.mlp.up_proj'
const weight = `${layer}.weight`

/** A copy of a golden model with changed tensors. */
function changed(model: string, edit: (tensors: Map<string, Stored>) => void): string {
  const target = join(folder, String(made++))
  mkdirSync(target)
  const source = join(goldenSubset, 'models', model)
  copyFileSync(join(source, 'config.json'), join(target, 'config.json'))
  const tensors = readSafetensors(join(source, 'model.safetensors'))
  edit(tensors)
  writeSafetensors(join(target, 'model.safetensors'), tensors)
  return target
}

const bytes = (text: string | Uint8Array): Stored => {
  const data = typeof text === 'string' ? new Uint8Array(Buffer.from(text)) : text
  return { dtype: 'U8', shape: [data.length], data }
}
const floats = (data: Float32Array): Stored => ({ dtype: 'F32', shape: [data.length], data })

describe.each(devices())('on %s', (device) => {
  const refused = async (model: string, edit: (tensors: Map<string, Stored>) => void) => {
    const failing = AutoModelForCausalLM.fromPretrained(changed(model, edit), { device })
    const error = await rejection(failing)
    expect(error.code).toBe('ERR_HALFBYTE_CHECKPOINT')
    expect(error.message).toContain(layer)
  }

  describe.each([
    ['llama-bnb-nf4', 'nf4'],
    ['llama-bnb-fp4', 'fp4'],
  ])('the state of a weight of %s', (model, type) => {
    const name = `${weight}.quant_state.bitsandbytes__${type}`
    const good = JSON.parse(
      Buffer.from(
        readSafetensors(join(goldenSubset, 'models', model, 'model.safetensors')).get(name)!
          .data as Uint8Array,
      ).toString(),
    ) as Record<string, unknown>

    it.each<[string, string | Uint8Array]>([
      ['nothing', ''],
      ['no JSON', '{"quant_type": '],
      ['no text', Uint8Array.of(0xff, 0xfe, 0x00, 0xc3)],
      ['null', 'null'],
      ['a number', '7'],
      ['a list', '[]'],
      ['an empty object', '{}'],
      ['a name that objects have', '{"__proto__": {"blocksize": 64}, "constructor": 1}'],
      ['depth without end', '['.repeat(100_000)],
    ])('is %s', async (_, text) => {
      await refused(model, (tensors) => tensors.set(name, bytes(text)))
    })

    const nonsense: unknown[] = [null, true, '', 'x', -1, 0, 1.5, 1e30, [], {}, [[]], '64', 2 ** 53]
    const fields: [string, unknown[]][] = [
      ['quant_type', [...nonsense, 'NF4', 'int8', type === 'nf4' ? 'fp4' : 'nf4']],
      ['blocksize', [...nonsense, 32, 63, 1 << 30]],
      ['dtype', [...nonsense, 'int8', 'torch.float16', 'float64']],
      ['shape', [...nonsense, [1], [-1, -1], [1e9, 1e9], [2 ** 53 - 1, 2 ** 53 - 1], ['8', '8'], [0, 0], 64]],
      ['surprise', [1]],
      ...('nested_offset' in good
        ? ([
            ['nested_blocksize', [...nonsense, 64, 255]],
            ['nested_dtype', [...nonsense, 'float16']],
            ['nested_offset', nonsense.filter((value) => typeof value !== 'number')],
          ] as [string, unknown[]][])
        : []),
    ]
    it.each(fields)('has nonsense for %s', async (field, values) => {
      for (const value of values) {
        await refused(model, (tensors) =>
          tensors.set(name, bytes(JSON.stringify({ ...good, [field]: value }))),
        )
      }
    })

    it.each(Object.keys(good))('lacks %s', async (field) => {
      const { [field]: _, ...rest } = good
      await refused(model, (tensors) => tensors.set(name, bytes(JSON.stringify(rest))))
    })

    it('is not of bytes, is there twice, or is that of another type', async () => {
      await refused(model, (tensors) => tensors.set(name, floats(new Float32Array(8))))
      await refused(model, (tensors) => {
        const other = `${weight}.quant_state.bitsandbytes__${type === 'nf4' ? 'fp4' : 'nf4'}`
        tensors.set(other, tensors.get(name)!)
      })
      await refused(model, (tensors) => {
        const other = `${weight}.quant_state.bitsandbytes__${type === 'nf4' ? 'fp4' : 'nf4'}`
        tensors.set(other, tensors.get(name)!)
        tensors.delete(name)
      })
    })

    it('has statistics of another size or kind, or codes of another length', async () => {
      for (const part of ['', '.absmax', '.quant_map', '.nested_absmax', '.nested_quant_map']) {
        const stored = readSafetensors(join(goldenSubset, 'models', model, 'model.safetensors')).get(
          weight + part,
        )
        if (!stored) continue
        for (const shape of [[], [0], [7], [1 << 16]]) {
          const size = shape.reduce((a, b) => a * b, 1)
          await refused(model, (tensors) => {
            tensors.set(weight + part, { dtype: 'U8', shape, data: new Uint8Array(size) })
          })
          await refused(model, (tensors) => {
            tensors.set(weight + part, { dtype: 'F32', shape, data: new Float32Array(size) })
          })
        }
      }
    })

    it('has NaN or infinity in its statistics', async () => {
      for (const part of ['absmax', 'nested_absmax']) {
        for (const bad of [NaN, Infinity]) {
          const whole = readSafetensors(join(goldenSubset, 'models', model, 'model.safetensors'))
          const stored = whole.get(`${weight}.${part}`)
          if (stored?.dtype !== 'F32') continue
          const data = (stored.data as Float32Array).slice()
          data[0] = bad
          await refused(model, (tensors) => tensors.set(`${weight}.${part}`, { ...stored, data }))
        }
      }
      if ('nested_offset' in good) {
        for (const bad of ['NaN', 'Infinity', '1e999']) {
          const text = JSON.stringify({ ...good, nested_offset: 0 }).replace(
            '"nested_offset":0',
            `"nested_offset":${bad}`,
          )
          await refused(model, (tensors) => tensors.set(name, bytes(text)))
        }
      }
    })
  })

  it('rows of 8-bit weights have statistics of another size or kind, or NaN in them', async () => {
    const model = 'llama-bnb-int8'
    const SCB = `${layer}.SCB`
    const stored = readSafetensors(join(goldenSubset, 'models', model, 'model.safetensors')).get(SCB)!
    const edits: Stored[] = [
      floats(new Float32Array(7)),
      floats(new Float32Array(0)),
      {
        ...stored,
        dtype: 'U8',
        shape: [stored.data.byteLength],
        data: new Uint8Array(stored.data.byteLength),
      },
      { ...stored, data: new Float32Array(stored.data.length).fill(NaN) },
      { ...stored, data: new Float32Array(stored.data.length).fill(Infinity) },
    ]
    for (const wrong of edits) {
      const failing = AutoModelForCausalLM.fromPretrained(
        changed(model, (tensors) => tensors.set(SCB, wrong)),
        { device },
      )
      const error = await rejection(failing)
      expect(error.code).toBe('ERR_HALFBYTE_CHECKPOINT')
      expect(error.message).toContain(layer)
    }
  })
})
