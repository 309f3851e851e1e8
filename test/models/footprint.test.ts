/**
 * Footprints of models of the Hub, by their shapes: transformers' own tests expect these ratios of float16 to quantised.
 */
import {
  BitsAndBytesConfig,
  CausalLM,
  ConfigReader,
  getMemoryFootprint,
  onMeta,
  replaceWithQuantizedLinear,
} from '../../lib'
import { readSpec } from '../../lib/models/families'

const common = { vocab_size: 32000, num_attention_heads: 32, hidden_size: 2048 }
/** Name, config.json, bytes of buffers in Python, and the ratios for 4 and 8 bits. */
const models: [string, Record<string, unknown>, number, number, number][] = [
  [
    'bloom-1b7',
    { model_type: 'bloom', vocab_size: 250880, hidden_size: 2048, n_head: 16, n_layer: 24 },
    0,
    2.109659552692574,
    1.540025,
  ],
  [
    'gpt2-xl',
    { model_type: 'gpt2', vocab_size: 50257, n_embd: 1600, n_head: 25, n_layer: 48, n_positions: 1024 },
    48 * (1024 ** 2 + 2), // causal masks
    3.3191854854152187,
    1.8720077507258357,
  ],
  [
    'TinyLlama-1.1B',
    {
      ...common,
      model_type: 'llama',
      num_key_value_heads: 4,
      num_hidden_layers: 22,
      intermediate_size: 5632,
    },
    2944,
    2.9461410686392764,
    1.7869331026479096,
  ],
]

describe.each(models)('%s', (_, raw, buffers, ratio4, ratio8) => {
  const config = new ConfigReader(raw, 'config.json')
  const build = () => onMeta(() => new CausalLM(readSpec(config), config), { dtype: 'float16' })
  const bytes = (model: CausalLM) => getMemoryFootprint(model, { returnBuffers: false }) + buffers

  it.each([
    ['4', { loadIn4bit: true }, ratio4],
    ['8', { loadIn8bit: true }, ratio8],
  ])('in %s bits', (_bits, options, ratio) => {
    const [dense, quantised] = [build(), build()]
    replaceWithQuantizedLinear(quantised, new BitsAndBytesConfig(options))
    expect(Math.abs(bytes(dense) / bytes(quantised) - ratio)).toBeLessThan(1e-6)
    expect(quantised.numParameters()).toBe(dense.numParameters())
  })
})
