import { join } from 'node:path'
import {
  AutoModelForCausalLM,
  devices,
  getMemoryFootprint,
  getTrueFootprint,
  Linear8bit,
  type CausalLM,
  type FromPretrainedOptions,
  type LoadProgress,
} from '../../lib'
import { ids, load, logits } from '../support/causal_lm'
import { temporaryFolders } from '../support/files'
import { goldenSubset } from '../support/golden'
import { allocatedMemory, baselineMemory } from '../support/memory'
import { relativeError } from '../support/reference'
import { readSafetensors, type Stored } from '../support/safetensors'
import { tinyWeights, writeTinyModel } from '../support/tiny_model'

const fresh = temporaryFolders()

async function logitsOf(folder: string, options: FromPretrainedOptions): Promise<Float32Array> {
  using model = await load(folder, options)
  return await logits(model)
}

describe.each(devices())('loading on %s', (device) => {
  const on = (options: FromPretrainedOptions = {}) => ({ device, ...options })

  it('gives the same model from one file, from shards, and with the base prefix left out', async () => {
    const weights = tinyWeights()
    const expected = await logitsOf(writeTinyModel(fresh()), on())
    const sharded = writeTinyModel(fresh(), {}, weights, (name) => `part-${name.length % 3}.safetensors`)
    expect(await logitsOf(sharded, on())).toEqual(expected)
    const bare = new Map([...weights].map(([name, tensor]) => [name.replace(/^model\./, ''), tensor]))
    expect(await logitsOf(writeTinyModel(fresh(), {}, bare), on())).toEqual(expected)
  })

  it('reads weights and statistics of a quantised checkpoint from different shards', async () => {
    const source = join(goldenSubset, 'models', 'llama-bnb-nf4')
    const tensors = readSafetensors(join(source, 'model.safetensors'))
    const config = JSON.parse(
      (await import('node:fs')).readFileSync(join(source, 'config.json'), 'utf8'),
    ) as Record<string, unknown>
    const folder = writeTinyModel(fresh(), config, tensors, (name) =>
      /\.(absmax|nested_absmax|quant_map)$/.test(name)
        ? 'b.safetensors'
        : name.includes('quant_state')
          ? 'c.safetensors'
          : 'a.safetensors',
    )
    expect(await logitsOf(folder, on())).toEqual(await logitsOf(source, on()))
  })

  it('takes a checkpoint of which nothing but the head is quantised', async () => {
    const weights = tinyWeights()
    const codes = Int8Array.from({ length: 50 * 64 }, (_, i) => ((i * 37) % 255) - 127)
    weights.set('lm_head.weight', { dtype: 'I8', shape: [50, 64], data: codes })
    weights.set('lm_head.SCB', { dtype: 'F32', shape: [50], data: new Float32Array(50).fill(0.5) })
    const config = { quantization_config: { quant_method: 'bitsandbytes', load_in_8bit: true } }
    const folder = writeTinyModel(fresh(), config, weights)
    using model = await AutoModelForCausalLM.fromPretrained(folder, on())
    const quantized = [...model.namedModules()].flatMap(([path, module]) =>
      module instanceof Linear8bit ? [{ path, module }] : [],
    )
    expect(quantized.map(({ path }) => path)).toEqual(['lm_head'])
    using weight = quantized[0]!.module.dequantizeWeight('float32')
    const dense = Float32Array.from(codes, (code) => Math.fround(code * 0.5) / 127)
    expect(relativeError(await weight.floats(), dense)).toBeLessThan(1e-6)
    using logits = model.forward(ids)
    expect((await logits.floats()).every(Number.isFinite)).toBe(true)
  })

  it('ties what the config ties, also when the checkpoint has the head as well', async () => {
    const config = { tie_word_embeddings: true }
    const weights = tinyWeights(config)
    const expected = await logitsOf(writeTinyModel(fresh(), config, weights), on())
    const both = new Map([['lm_head.weight', weights.get('model.embed_tokens.weight')!], ...weights])
    expect(await logitsOf(writeTinyModel(fresh(), config, both), on())).toEqual(expected)
    using model = await AutoModelForCausalLM.fromPretrained(writeTinyModel(fresh(), config, both), on())
    expect(model.lm_head.weight).toBe(model.model.embed_tokens.weight)
  })

  it('converts to the dtype that is asked for, and keeps the checkpoint’s by default', async () => {
    const folder = writeTinyModel(fresh())
    using plain = await AutoModelForCausalLM.fromPretrained(folder, on())
    expect(plain.computeDtype).toBe('float32')
    using half = await AutoModelForCausalLM.fromPretrained(folder, on({ dtype: 'float16' }))
    expect(half.computeDtype).toBe('float16')
    expect(getMemoryFootprint(half)).toBeLessThan(getMemoryFootprint(plain) * 0.51)
    using logits = half.forward(ids)
    const [a, b] = [await logits.floats(), await logitsOf(folder, on())]
    expect(Math.max(...a.map((x, i) => Math.abs(x - b[i]!)))).toBeLessThan(0.02)
  })

  it('tells how far it is', async () => {
    const seen: LoadProgress[] = []
    using model = await AutoModelForCausalLM.fromPretrained(
      writeTinyModel(fresh()),
      on({ onProgress: (progress) => seen.push(progress) }),
    )
    expect(seen.length).toBe([...model.namedParameters()].length)
    const total = [...tinyWeights().values()].reduce((sum, { data }) => sum + data.byteLength, 0)
    expect(seen.at(-1)).toMatchObject({ loadedBytes: total, totalBytes: total })
    expect(seen.every(({ loadedBytes }, i) => i === 0 || loadedBytes > seen[i - 1]!.loadedBytes)).toBe(true)
    expect(seen.every(({ tensor }) => tinyWeights().has(tensor))).toBe(true)
  })

  it('never holds more than the result and one tensor', async () => {
    // the largest tensor is the MLP's, so that quantised weights would pile up visibly
    const config = { hidden_size: 256, intermediate_size: 1024, num_hidden_layers: 6 }
    const folder = writeTinyModel(fresh(), config)
    const largest = 256 * 1024 * 4
    for (const quantizationConfig of [
      undefined,
      { loadIn4bit: true, bnb4bitQuantType: 'nf4' as const },
      { loadIn8bit: true },
    ]) {
      const before = await baselineMemory(device)
      using model = await AutoModelForCausalLM.fromPretrained(folder, on({ quantizationConfig }))
      const peak = device.memoryUsage().peak - before
      const result = getTrueFootprint(model)
      // some room for alignment and small tensors
      expect(peak).toBeLessThan(result + largest * 1.25 + 65536)
      expect(device.memoryUsage().allocated - before).toBeLessThan(result * 1.05 + 65536)
    }
  }, 60_000)

  it('frees everything when it is aborted, and rejects with the reason', async () => {
    const folder = writeTinyModel(fresh())
    const before = await baselineMemory(device)
    const reason = new Error('changed my mind')
    await expect(
      AutoModelForCausalLM.fromPretrained(folder, on({ signal: AbortSignal.abort(reason) })),
    ).rejects.toBe(reason)
    const controller = new AbortController()
    let tensors = 0
    const loading = AutoModelForCausalLM.fromPretrained(
      folder,
      on({ signal: controller.signal, onProgress: () => ++tensors === 5 && controller.abort(reason) }),
    )
    await expect(loading).rejects.toBe(reason)
    expect(tensors).toBe(5)
    expect(await allocatedMemory(device)).toBeLessThanOrEqual(before)
  })

  describe('a checkpoint that does not fit', () => {
    const change = (edit: (weights: Map<string, Stored>) => void) => {
      const weights = tinyWeights()
      edit(weights)
      return weights
    }
    const poison = (name: string, value: number) =>
      change((w) => void ((w.get(name)!.data as Float32Array)[7] = value))
    const q = 'model.layers.1.self_attn.q_proj.weight'
    const four = { loadIn4bit: true }
    const eight = { loadIn8bit: true }

    it.each<[string, Record<string, unknown>, Map<string, Stored>, FromPretrainedOptions, string, RegExp]>([
      [
        'missing tensors',
        {},
        change((w) => (w.delete(q), w.delete('lm_head.weight'))),
        {},
        'CHECKPOINT',
        /the model lacks 2 tensors: model.layers.1.self_attn.q_proj.weight, lm_head.weight/,
      ],
      [
        'all tensors of other names',
        {},
        new Map([['x', tinyWeights().get(q)!]]),
        {},
        'CHECKPOINT',
        /the model lacks 21 tensors: .* and 13 more; 1 are not the model's: x/,
      ],
      [
        'a config of another size',
        { intermediate_size: 128 },
        tinyWeights(),
        {},
        'CHECKPOINT',
        /disagree: model.layers.0.mlp.gate_proj.weight is F32 \[96, 64\], the model has \[128, 64\]/,
      ],
      [
        'the same, quantised',
        { intermediate_size: 128 },
        tinyWeights(),
        { quantizationConfig: four },
        'CHECKPOINT',
        /disagree: model.layers.0.mlp.gate_proj.weight/,
      ],
      [
        'integers for weights',
        {},
        change((w) => w.set(q, { dtype: 'I32', shape: [64, 64], data: new Int32Array(4096) })),
        {},
        'CHECKPOINT',
        /q_proj.weight is I32/,
      ],
      [
        'doubles for weights',
        {},
        change((w) => w.set(q, { dtype: 'F64', shape: [64, 64], data: new Float64Array(4096) })),
        {},
        'CHECKPOINT',
        /q_proj.weight is F64/,
      ],
      [
        'NaN',
        {},
        poison(q, NaN),
        {},
        'CHECKPOINT',
        /NaN or infinity in the weights: model.layers.1.self_attn.q_proj.weight \(1\)/,
      ],
      [
        'NaN in a norm',
        {},
        poison('model.norm.weight', NaN),
        { quantizationConfig: four },
        'CHECKPOINT',
        /model.norm.weight \(1\)/,
      ],
      [
        'NaN in what is quantised to 4 bits',
        {},
        poison(q, NaN),
        { quantizationConfig: four },
        'CHECKPOINT',
        /model.layers.1.self_attn.q_proj \(1\)/,
      ],
      [
        'infinity in what is quantised to 8 bits',
        {},
        poison(q, Infinity),
        { quantizationConfig: eight },
        'CHECKPOINT',
        /model.layers.1.self_attn.q_proj/,
      ],
      [
        'numbers beyond float16',
        {},
        poison(q, 1e6),
        { dtype: 'float16' },
        'CHECKPOINT',
        /q_proj.weight \(1\)/,
      ],
    ])('has %s', async (_, config, weights, options, code, message) => {
      const folder = writeTinyModel(fresh(), config, weights)
      const before = await baselineMemory(device)
      const loading = AutoModelForCausalLM.fromPretrained(folder, on(options))
      await expect(loading).rejects.toMatchObject({
        name: 'HalfbyteError',
        code: `ERR_HALFBYTE_${code}`,
        message: expect.stringMatching(message) as string,
      })
      expect(await allocatedMemory(device)).toBeLessThanOrEqual(before)
    })

    it('has a weight that lacks its statistics', async () => {
      const source = join(goldenSubset, 'models', 'llama-bnb-int8')
      const tensors = readSafetensors(join(source, 'model.safetensors'))
      tensors.delete('model.layers.0.mlp.up_proj.SCB')
      const { readFileSync } = await import('node:fs')
      const config = JSON.parse(readFileSync(join(source, 'config.json'), 'utf8')) as Record<string, unknown>
      const loading = AutoModelForCausalLM.fromPretrained(writeTinyModel(fresh(), config, tensors), on())
      await expect(loading).rejects.toThrow(/model.layers.0.mlp.up_proj/)
    })

    it('has more than the model: a warning, and derived tensors are silent', async () => {
      const extra = change((w) => {
        w.set('model.layers.9.mlp.up_proj.weight', w.get(q)!)
        w.set('model.layers.0.self_attn.rotary_emb.inv_freq', {
          dtype: 'F32',
          shape: [2],
          data: Float32Array.of(1, 2),
        })
      })
      const warnings: string[] = []
      using model: CausalLM = await AutoModelForCausalLM.fromPretrained(
        writeTinyModel(fresh(), {}, extra),
        on({ onWarning: (message) => warnings.push(message) }),
      )
      expect(model.spec.layers.length).toBe(2)
      expect(warnings).toEqual([
        expect.stringContaining('the model has no use for 1 tensor: model.layers.9.mlp.up_proj.weight'),
      ])
    })
  })
})
