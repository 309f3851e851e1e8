import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { BitsAndBytesConfig, HalfbyteError } from '../../lib/index.js'
import { itWithGolden } from '../support/golden.js'

const fails = (make: () => unknown, message: RegExp) => {
  expect(make).toThrow(HalfbyteError)
  expect(make).toThrow(expect.objectContaining({ code: 'ERR_HALFBYTE_CONFIG' }) as Error)
  expect(make).toThrow(message)
}
const anything = (options: unknown) => new BitsAndBytesConfig(options as object)

describe('BitsAndBytesConfig', () => {
  it("has Python's fields and defaults", () => {
    const config = new BitsAndBytesConfig({ loadIn4bit: true })
    expect(config).toMatchObject({
      loadIn4bit: true,
      loadIn8bit: false,
      llmInt8Threshold: 6,
      llmInt8SkipModules: null,
      llmInt8EnableFp32CpuOffload: false,
      llmInt8HasFp16Weight: false,
      bnb4bitComputeDtype: 'float32',
      bnb4bitQuantType: 'fp4',
      bnb4bitUseDoubleQuant: false,
      bnb4bitQuantStorage: 'uint8',
      bnbExact: false,
      blocksize: 64,
    })
    expect(config.quantizationMethod()).toBe('fp4')
    expect(new BitsAndBytesConfig({ loadIn8bit: true }).quantizationMethod()).toBe('llm_int8')
  })

  it('writes the 13 keys that transformers writes, in its order', () => {
    const json = new BitsAndBytesConfig({ loadIn4bit: true, bnb4bitQuantType: 'nf4' }).toJSON()
    expect(Object.keys(json)).toEqual([
      '_load_in_4bit',
      '_load_in_8bit',
      'bnb_4bit_compute_dtype',
      'bnb_4bit_quant_storage',
      'bnb_4bit_quant_type',
      'bnb_4bit_use_double_quant',
      'llm_int8_enable_fp32_cpu_offload',
      'llm_int8_has_fp16_weight',
      'llm_int8_skip_modules',
      'llm_int8_threshold',
      'load_in_4bit',
      'load_in_8bit',
      'quant_method',
    ])
    expect(BitsAndBytesConfig.fromJSON(json)).toEqual(
      new BitsAndBytesConfig({ loadIn4bit: true, bnb4bitQuantType: 'nf4' }),
    )
  })

  it('writes our own fields only when they are set', () => {
    const config = new BitsAndBytesConfig({ loadIn4bit: true, bnbExact: true, blocksize: 128 })
    const json = config.toJSON()
    expect(json).toMatchObject({ halfbyte_bnb_exact: true, halfbyte_blocksize: 128 })
    expect(BitsAndBytesConfig.fromJSON(JSON.parse(JSON.stringify(json)))).toEqual(config)
  })

  it('tells what differs from the defaults', () => {
    const config = new BitsAndBytesConfig({ loadIn4bit: true, bnb4bitQuantType: 'nf4' })
    expect(config.toDiff()).toEqual({
      quant_method: 'bitsandbytes',
      load_in_4bit: true,
      _load_in_4bit: true,
      bnb_4bit_quant_type: 'nf4',
    })
  })

  it('refuses what Python lets pass', () => {
    fails(() => new BitsAndBytesConfig(), /neither loadIn4bit nor loadIn8bit/)
    fails(() => new BitsAndBytesConfig({ loadIn4bit: true, loadIn8bit: true }), /both true/)
    fails(
      () => anything({ loadIn4bit: true, bnb4bitQuantType: 'int4' }),
      /bnb4bitQuantType is "int4".*nf4, fp4/,
    )
    fails(() => anything({ loadIn4bit: true, load_in_8bit: true }), /unknown field load_in_8bit/)
    fails(() => anything(null), /fields are null, they must be an object/)
    fails(() => anything('nf4'), /fields are nf4, they must be an object/)
    fails(() => anything({ loadIn4bit: 'yes' }), /loadIn4bit is "yes"/)
    fails(() => anything({ loadIn4bit: true, bnb4bitComputeDtype: 'bf16' }), /bnb4bitComputeDtype is "bf16"/)
    fails(() => anything({ loadIn4bit: true, bnb4bitQuantStorage: 'add' }), /bnb4bitQuantStorage/)
    fails(() => anything({ loadIn8bit: true, llmInt8Threshold: -1 }), /llmInt8Threshold is -1/)
    fails(() => anything({ loadIn8bit: true, llmInt8Threshold: NaN }), /llmInt8Threshold/)
    fails(() => anything({ loadIn8bit: true, llmInt8Threshold: '6' }), /llmInt8Threshold/)
    fails(() => anything({ loadIn8bit: true, llmInt8SkipModules: 'lm_head' }), /llmInt8SkipModules/)
    fails(() => anything({ loadIn8bit: true, llmInt8SkipModules: [1] }), /llmInt8SkipModules/)
    fails(() => anything({ loadIn4bit: true, blocksize: 48 }), /blocksize is 48/)
  })

  it('reads JSON of before quant_method was written, and nothing unknown', () => {
    expect(BitsAndBytesConfig.fromJSON({ load_in_8bit: true }).loadIn8bit).toBe(true)
    expect(
      BitsAndBytesConfig.fromJSON({ load_in_4bit: true, bnb_4bit_compute_dtype: null }).bnb4bitComputeDtype,
    ).toBe('float32')
    fails(
      () => BitsAndBytesConfig.fromJSON({ load_in_8bit: true, quant_method: 'gptq' }),
      /quant_method is "gptq"/,
    )
    fails(() => BitsAndBytesConfig.fromJSON({ load_in_8bit: true, blocksize: 32 }), /unknown key blocksize/)
    fails(() => BitsAndBytesConfig.fromJSON(null), /must be an object/)
    fails(() => BitsAndBytesConfig.fromJSON([]), /must be an object/)
    fails(() => BitsAndBytesConfig.fromJSON({}), /neither/)
  })

  const golden = 'models/llama-bnb-nf4/config.json'
  itWithGolden(golden, 'round-trips every quantization_config that transformers wrote', (path) => {
    const folder = join(path, '..', '..')
    for (const name of readdirSync(folder).filter((entry) => entry.includes('-bnb-'))) {
      const text = readFileSync(join(folder, name, 'config.json'), 'utf8')
      const written = (JSON.parse(text) as { quantization_config: object }).quantization_config
      const config = BitsAndBytesConfig.fromJSON(written)
      expect(JSON.stringify(config)).toBe(JSON.stringify(written))
    }
  })
})
