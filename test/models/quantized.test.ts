/** What a quantised model knows about itself, and the ways back. */
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import {
  AutoModelForCausalLM,
  BitsAndBytesConfig,
  devices,
  Linear,
  Linear4bit,
  Linear8bit,
  loadCheckpoint,
  Module,
  nn,
  onMeta,
  replaceWithQuantizedLinear,
  RMSNorm,
  saveStateDict,
  type BitsAndBytesConfigOptions,
} from '../../lib'
import { logits } from '../support/causal_lm'
import { rejection } from '../support/errors'
import { temporaryFolders } from '../support/files'
import { goldenPath } from '../support/golden'
import { error } from '../support/golden_model'
import { writeTinyModel } from '../support/tiny_model'

const fresh = temporaryFolders()

const savedQuantization = (at: string) => {
  const config = JSON.parse(readFileSync(join(at, 'config.json'), 'utf8')) as Record<string, unknown>
  return config['quantization_config'] as Record<string, unknown> | undefined
}

const kinds: [string, BitsAndBytesConfigOptions, string][] = [
  ['4-bit', { loadIn4bit: true, bnb4bitQuantType: 'nf4', bnb4bitUseDoubleQuant: true }, 'nf4'],
  ['8-bit', { loadIn8bit: true }, 'llm_int8'],
]

describe.each(devices())('on %s', (device) => {
  const tiny = writeTinyModel(fresh())

  describe.each(kinds)('a model in %s', (kind, quantizationConfig, method) => {
    it('knows how it is quantised', async () => {
      using model = await AutoModelForCausalLM.fromPretrained(tiny, { device, quantizationConfig })
      expect(model).toMatchObject({
        isQuantized: true,
        isLoadedIn4bit: kind === '4-bit',
        isLoadedIn8bit: kind === '8-bit',
        isQuantizedTrainingEnabled: true,
        quantizationMethod: method,
      })
      expect(model.quantizationConfig).toEqual(new BitsAndBytesConfig(quantizationConfig))
      expect(model.replacement!.replaced.length).toBe(14)
      expect(model.getTrueFootprint()).toBeGreaterThan(model.getMemoryFootprint())
      using plain = await AutoModelForCausalLM.fromPretrained(tiny, { device })
      expect(plain).toMatchObject({ isQuantized: false, isLoadedIn4bit: false, isLoadedIn8bit: false })
      expect(plain.quantizationMethod).toBeUndefined()
      expect(model.numParameters()).toBe(plain.numParameters())
      expect(plain.getTrueFootprint()).toBe(plain.getMemoryFootprint())
    })

    it('becomes dense again, to be cast and saved as such', async () => {
      using model = await AutoModelForCausalLM.fromPretrained(tiny, { device, quantizationConfig })
      const before = await logits(model)
      expect((await rejection(Promise.resolve().then(() => model.to('float16')))).code).toBe(
        'ERR_HALFBYTE_DTYPE',
      )
      expect(model.dequantize()).toBe(model)
      expect(model).toMatchObject({ isQuantized: false, isLoadedIn4bit: false, isLoadedIn8bit: false })
      expect(model.modules().some((m) => m instanceof Linear4bit || m instanceof Linear8bit)).toBe(false)
      const after = await logits(model)
      expect(error(after, before).most).toBeLessThan(kind === '4-bit' ? 1e-5 : 0.03)
      const target = fresh()
      await model.savePretrained(target)
      expect(savedQuantization(target)).toBeUndefined()
      using again = await AutoModelForCausalLM.fromPretrained(target, { device })
      expect(await logits(again)).toEqual(after)
      model.to('float16')
      expect(model.computeDtype).toBe('float16')
      expect((await rejection(Promise.resolve().then(() => model.dequantize()))).code).toBe(
        'ERR_HALFBYTE_NO_LINEAR',
      )
    })

    it('that was patched in memory is saved as one that was loaded so', async () => {
      using model = await AutoModelForCausalLM.fromPretrained(tiny, { device })
      const report = replaceWithQuantizedLinear(model, quantizationConfig, {
        modulesToNotConvert: ['v_proj'],
      })
      expect(model.replacement).toBe(report)
      const target = fresh()
      await model.savePretrained(target)
      // Python's list replaces the automatic one, and knows no patterns: every layer that stays is in it
      expect(savedQuantization(target)).toMatchObject({
        llm_int8_skip_modules: [
          'model.layers.0.self_attn.v_proj',
          'model.layers.1.self_attn.v_proj',
          'lm_head',
        ],
      })
      using again = await AutoModelForCausalLM.fromPretrained(target, { device })
      expect(again.getSubmodule('model.layers.1.self_attn.v_proj').constructor).toBe(Linear)
      expect(again.isQuantized).toBe(true)
      expect(await logits(again)).toEqual(await logits(model))
      expect(again.replacement!.skipModules).toBeNull()
      const third = fresh()
      await again.savePretrained(third)
      for (const name of ['config.json', 'model.safetensors']) {
        expect(readFileSync(join(third, name)).equals(readFileSync(join(target, name)))).toBe(true)
      }
    })

    describe.each([
      ['qwen3-moe', 2 * (4 + 8 * 3), 'experts.7.down_proj', 'gate'],
      ['gpt-oss', 2 * (4 + 4 * 2), 'experts.gate_up_projs.3', 'router'],
    ])('with experts: %s', (family, layers, expert, router) => {
      const golden = goldenPath(`models/${family}`)
      const name = 'has each of them quantised, and no router'
      if (!golden) {
        it.skip(`${name} (set HALFBYTE_GOLDEN to the golden data)`, () => undefined)
        return
      }
      it(name, async () => {
        using plain = await AutoModelForCausalLM.fromPretrained(golden, { device })
        using model = await AutoModelForCausalLM.fromPretrained(golden, { device, quantizationConfig })
        const { replaced, kept } = model.replacement!
        expect(replaced.length).toBe(layers)
        expect(replaced.map(({ path }) => path)).toContain(`model.layers.1.mlp.${expert}`)
        expect(kept).toEqual([
          { path: `model.layers.0.mlp.${router}`, reason: 'router' },
          { path: `model.layers.1.mlp.${router}`, reason: 'router' },
          { path: 'lm_head', reason: 'output head' },
        ])
        const saved = plain.getMemoryFootprint() - model.getMemoryFootprint()
        const dense = replaced.reduce((sum, { bytesBefore }) => sum + bytesBefore, 0)
        expect(saved).toBe(dense * (kind === '4-bit' ? 7 / 8 : 3 / 4))
        expect(model.numParameters()).toBe(plain.numParameters())
        const target = fresh()
        await model.savePretrained(target, { maxShardSize: '100KB' })
        expect(savedQuantization(target)!['llm_int8_skip_modules']).toEqual(kept.map(({ path }) => path))
        using again = await AutoModelForCausalLM.fromPretrained(target, { device })
        expect(again.getTrueFootprint()).toBe(model.getTrueFootprint())
        const before = await logits(model)
        expect(await logits(again)).toEqual(before)
        const after = await logits(again.dequantize())
        expect(error(after, before).most).toBeLessThan(kind === '4-bit' ? 1e-5 : 0.1)
        expect([...again.namedParameters()].map(([path]) => path)).toEqual(
          [...plain.namedParameters()].map(([path]) => path),
        )
        await again.savePretrained(target)
        using dequantized = await AutoModelForCausalLM.fromPretrained(target, { device })
        expect(await logits(dequantized)).toEqual(after)
      })
    })
  })

  it('a model that is patched in part is saved only with a config that says how', async () => {
    using model = await AutoModelForCausalLM.fromPretrained(tiny, { device })
    const config = new BitsAndBytesConfig({ loadIn4bit: true, bnb4bitQuantType: 'nf4' })
    replaceWithQuantizedLinear(model.model, config)
    const target = fresh()
    const error = await rejection(model.savePretrained(target))
    expect(error.code).toBe('ERR_HALFBYTE_CONFIG')
    expect(error.message).toMatch(/q_proj is a Linear4bit, and quantizationConfig says nothing/)
    model.quantizationConfig = new BitsAndBytesConfig({ loadIn8bit: true })
    await expect(model.savePretrained(target)).rejects.toThrow(/says loadIn8bit/)
    model.quantizationConfig = config
    await model.savePretrained(target)
    using again = await AutoModelForCausalLM.fromPretrained(target, { device })
    expect(await logits(again)).toEqual(await logits(model))
  })

  it('a list entry that names nothing is a warning', async () => {
    const warnings: string[] = []
    using model = await AutoModelForCausalLM.fromPretrained(tiny, {
      device,
      quantizationConfig: { loadIn8bit: true, llmInt8SkipModules: ['vproj', 'q_proj'] },
      onWarning: (message) => warnings.push(message),
    })
    expect(warnings).toEqual(['the list of modules to keep names no linear layer with vproj'])
    expect(model.replacement!.replaced.length).toBe(12)
  })

  it('a quantised checkpoint keeps what was not asked for, and says what cannot be changed', async () => {
    const source = fresh()
    const quantizationConfig = {
      loadIn4bit: true,
      bnb4bitQuantType: 'nf4',
      bnb4bitComputeDtype: 'bfloat16',
    } as const
    using first = await AutoModelForCausalLM.fromPretrained(tiny, { device, quantizationConfig })
    await first.savePretrained(source)
    const warnings: string[] = []
    const open = (given: BitsAndBytesConfig) =>
      AutoModelForCausalLM.fromPretrained(source, {
        device,
        quantizationConfig: given,
        onWarning: (message) => warnings.push(message),
      })
    using same = await open(new BitsAndBytesConfig({ loadIn4bit: true }))
    expect(same.quantizationConfig).toMatchObject({
      bnb4bitComputeDtype: 'bfloat16',
      bnb4bitQuantType: 'nf4',
    })
    expect(warnings).toEqual([])
    using other = await open(
      new BitsAndBytesConfig({ loadIn4bit: true, bnb4bitComputeDtype: 'float32', bnb4bitQuantType: 'fp4' }),
    )
    expect(other.quantizationConfig).toMatchObject({
      bnb4bitComputeDtype: 'float32',
      bnb4bitQuantType: 'nf4',
    })
    expect(warnings).toEqual([expect.stringMatching(/quantised already, with bnb4bitQuantType "nf4"/)])
  })

  describe('modules that stay in float32', () => {
    class Net extends Module {
      readonly keepInFp32Modules = ['wo', 'norm']
      quantizationConfig: BitsAndBytesConfig | undefined = undefined
      wi = new Linear(64, 32)
      wo = new Linear(32, 64, { bias: false })
      norm = new RMSNorm(64)
      scale = new nn.Parameter([1])
      forward(): void {}
    }

    it.each([undefined, ...kinds.map(([, config]) => config)])(
      'are neither cast nor quantised: %j',
      async (config) => {
        const source = fresh()
        const whole = new Net()
        whole.scale.load(nn.Parameter.of(whole.norm.weight.value).value.slice(0, 0, 1))
        const state = await whole.to(device).stateDict()
        await saveStateDict(source, state)
        const net = onMeta(() => new Net())
        const report = await loadCheckpoint(net, source, {
          device,
          dtype: 'float16',
          quantizationConfig: config,
        })
        expect([net.wo.weight, net.norm.weight].map((p) => p.value.dtype)).toEqual(['float32', 'float32'])
        expect([net.wi.bias!, net.scale].map((p) => p.value.dtype)).toEqual(['float16', 'float16'])
        expect(await net.wo.weight.value.data()).toEqual(await whole.wo.weight.value.data())
        expect(report.replacement?.kept ?? []).toEqual(
          config ? [{ path: 'wo', reason: 'it stays in float32' }] : [],
        )
        expect(report.replacement?.skipModules ?? null).toBeNull()
        expect(net.quantizationConfig?.toJSON()).toEqual(config && new BitsAndBytesConfig(config).toJSON())
        for (const module of [net, whole]) module.dispose()
        for (const tensor of state.values()) tensor.dispose()
      },
    )
  })
})
