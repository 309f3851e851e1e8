/** What config.json says of a model, and what it cannot say. */
import { join } from 'node:path'
import { AutoModelForCausalLM, type FromPretrainedOptions } from '../../lib'
import { temporaryFolder, temporaryFolders } from '../support/files'
import { goldenSubset } from '../support/golden'
import { tinyWeights, writeTinyModel } from '../support/tiny_model'

const fresh = temporaryFolders()

describe('config.json', () => {
  const load = (config: Record<string, unknown>, options: FromPretrainedOptions = {}) =>
    AutoModelForCausalLM.fromPretrained(writeTinyModel(fresh(), config, tinyWeights()), {
      device: 'cpu',
      ...options,
    })

  it.each<[string, Record<string, unknown>, FromPretrainedOptions, RegExp]>([
    [
      'an unknown model_type',
      { model_type: 'gpt5' },
      {},
      /model_type "gpt5" is not known; known are .*llama, mistral/,
    ],
    ['a model_type that JavaScript knows', { model_type: 'toString' }, {}, /"toString" is not known/],
    ['no model_type', { model_type: null }, {}, /model_type is missing/],
    ['no size', { hidden_size: null }, {}, /config.json: hidden_size is missing/],
    [
      'a size that is a text',
      { hidden_size: '64' },
      {},
      /hidden_size is "64", it must be a positive whole number/,
    ],
    ['a size of 0', { intermediate_size: 0 }, {}, /intermediate_size is 0/],
    [
      'heads that do not divide',
      { num_key_value_heads: 3 },
      {},
      /4 is not a multiple of num_key_value_heads 3/,
    ],
    ['an unknown activation', { hidden_act: 'warp' }, {}, /hidden_act is "warp"; known are silu/],
    [
      'an unknown rope_type',
      { rope_scaling: { rope_type: 'spiral' } },
      {},
      /rope_type "spiral" is not known; known are default, linear/,
    ],
    ['more layers than memory', { num_hidden_layers: 1e9 }, {}, /num_hidden_layers is 1000000000, more than/],
    ['a head beyond any memory', { head_dim: 1e15 }, {}, /head_dim is 1000000000000000, more than/],
    ['a negative eps', { rms_norm_eps: -1 }, {}, /rms_norm_eps is -1, it must be above 0/],
    ['half a window', { model_type: 'mistral', sliding_window: 0.5 }, {}, /sliding_window is 0.5/],
    [
      'a rope_type that JavaScript knows',
      { rope_scaling: { rope_type: 'toString' } },
      {},
      /"toString" is not known/,
    ],
    [
      'rope frequencies over 0',
      { rope_scaling: { type: 'linear', factor: 0 } },
      {},
      /rope_scaling: factor is 0, it must be above 0/,
    ],
    [
      'rope parameters that are missing',
      { rope_scaling: { type: 'linear' } },
      {},
      /rope_scaling: factor is missing/,
    ],
    [
      'a dtype that cannot be computed with',
      { torch_dtype: 'float8_e4m3fn' },
      {},
      /torch_dtype is "float8_e4m3fn"/,
    ],
    [
      'an unknown quant_method',
      { quantization_config: { quant_method: 'gptq' } },
      {},
      /config.json: .*quant_method is "gptq"/,
    ],
    [
      'both load-in flags',
      {},
      { quantizationConfig: { loadIn4bit: true, loadIn8bit: true } },
      /loadIn4bit and loadIn8bit are both true/,
    ],
    [
      'layer_types of another length',
      { model_type: 'mistral', sliding_window: 4, layer_types: ['full_attention'] },
      {},
      /layer_types has 1 entries/,
    ],
  ])('with %s', async (_, config, options, message) => {
    await expect(load(config, options)).rejects.toMatchObject({
      code: 'ERR_HALFBYTE_CONFIG',
      message: expect.stringMatching(message) as string,
    })
  })

  it('that calls plain weights quantised', async () => {
    const quantization_config = { quant_method: 'bitsandbytes', load_in_4bit: true }
    await expect(load({ quantization_config })).rejects.toMatchObject({
      code: 'ERR_HALFBYTE_CHECKPOINT',
      message: expect.stringMatching(/quantised to 4 bits, and none of the tensors is/) as string,
    })
  })

  it('beside arguments that mean nothing', async () => {
    const code = 'ERR_HALFBYTE_VALUE'
    const misplaced = { loadIn4bit: true } as FromPretrainedOptions
    await expect(load({}, misplaced)).rejects.toMatchObject({
      code,
      message: expect.stringMatching(
        /unknown option loadIn4bit; the options are quantizationConfig/,
      ) as string,
    })
    const wrong: [object, RegExp][] = [
      [{ device_map: 'auto' }, /unknown option device_map; its name is deviceMap/],
      [{ onProgress: 5 }, /onProgress must be a function/],
      [{ signal: null }, /signal must be an AbortSignal/],
    ]
    for (const [options, message] of wrong) {
      await expect(load({}, options as FromPretrainedOptions)).rejects.toMatchObject({
        code,
        message: expect.stringMatching(message) as string,
      })
    }
    const text = {
      quantizationConfig: { loadIn4bit: true },
      modulesToNotConvert: 'lm_head' as unknown as string[],
    }
    await expect(load({}, text)).rejects.toMatchObject({
      code,
      message: expect.stringMatching(/modulesToNotConvert is "lm_head", it must be a list/) as string,
    })
    await expect(AutoModelForCausalLM.fromPretrained(undefined as unknown as string)).rejects.toMatchObject({
      code,
    })
  })

  it('that is not there, or is no JSON', async () => {
    await expect(AutoModelForCausalLM.fromPretrained(temporary)).rejects.toMatchObject({
      code: 'ERR_HALFBYTE_CHECKPOINT',
      message: expect.stringContaining('no config.json') as string,
    })
  })
  const temporary = temporaryFolder()

  it('with another kind of quantisation than is asked for', async () => {
    const loading = AutoModelForCausalLM.fromPretrained(join(goldenSubset, 'models', 'llama-bnb-nf4'), {
      device: 'cpu',
      quantizationConfig: { loadIn8bit: true },
    })
    await expect(loading).rejects.toThrow(/quantised to 4-bit, 8-bit was asked for/)
  })

  it('quantised, with other use of the same weights', async () => {
    using model = await AutoModelForCausalLM.fromPretrained(join(goldenSubset, 'models', 'llama-bnb-int8'), {
      device: 'cpu',
      quantizationConfig: { loadIn8bit: true, llmInt8Threshold: 3 },
    })
    expect(model.quantizationConfig).toMatchObject({ llmInt8Threshold: 3, loadIn8bit: true })
  })
})
