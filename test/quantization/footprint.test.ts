/** Bytes of models as transformers counts them, and all bytes. */
import { readFileSync } from 'node:fs'
import {
  BitsAndBytesConfig,
  Embedding,
  getMemoryFootprint,
  Linear,
  Module,
  ModuleList,
  nn,
  onMeta,
  replaceWithQuantizedLinear,
  RMSNorm,
} from '../../lib/index.js'
import { goldenPath, itWithGolden } from '../support/golden.js'
import { replacedPaths, Tree } from '../support/tree'

/** The tensors of a Llama model, without its computations. */
function llama(config: Record<string, unknown>): Module {
  const c = config as Record<
    | 'hidden_size'
    | 'intermediate_size'
    | 'vocab_size'
    | 'num_hidden_layers'
    | 'head_dim'
    | 'num_attention_heads'
    | 'num_key_value_heads',
    number
  >
  const attention = { bias: config['attention_bias'] === true }
  const mlp = { bias: config['mlp_bias'] === true }
  const table = new Embedding(c.vocab_size, c.hidden_size)
  const head = new Linear(c.hidden_size, c.vocab_size, { bias: false })
  if (config['tie_word_embeddings']) head.weight = table.weight
  const heads = c.num_attention_heads * c.head_dim
  const shared = c.num_key_value_heads * c.head_dim
  const layer = () =>
    new Tree({
      self_attn: new Tree({
        q_proj: new Linear(c.hidden_size, heads, attention),
        k_proj: new Linear(c.hidden_size, shared, attention),
        v_proj: new Linear(c.hidden_size, shared, attention),
        o_proj: new Linear(heads, c.hidden_size, attention),
      }),
      mlp: new Tree({
        gate_proj: new Linear(c.hidden_size, c.intermediate_size, mlp),
        up_proj: new Linear(c.hidden_size, c.intermediate_size, mlp),
        down_proj: new Linear(c.intermediate_size, c.hidden_size, mlp),
      }),
      input_layernorm: new RMSNorm(c.hidden_size),
      post_attention_layernorm: new RMSNorm(c.hidden_size),
    })
  const frequencies = () => new nn.Buffer([c.head_dim / 2], { dtype: 'float32', persistent: false })
  return new Tree({
    model: new Tree({
      embed_tokens: table,
      layers: new ModuleList(Array.from({ length: c.num_hidden_layers }, layer)),
      norm: new RMSNorm(c.hidden_size),
      rotary_emb: new Tree({ inv_freq: frequencies(), original_inv_freq: frequencies() }),
    }),
    lm_head: head,
  })
}

describe('footprints', () => {
  itWithGolden(
    'models/summary.json',
    'and converted modules are those of transformers and bitsandbytes',
    (path) => {
      const summary = JSON.parse(readFileSync(path, 'utf8')) as {
        footprint: Record<string, number | string[]>
      }
      for (const [name, dtype] of [
        ['llama', 'float32'],
        ['llama-tied', 'float32'],
        ['mistral', 'float32'],
        ['llama-bnb-nf4', 'float32'],
        ['llama-bnb-fp4', 'float32'],
        ['llama-bnb-int8', 'float16'],
      ] as const) {
        const file = goldenPath(`models/${name}/config.json`)
        if (!file) continue // not all of them are in the fixtures
        const config = JSON.parse(readFileSync(file, 'utf8')) as Record<string, unknown>
        const model = onMeta(() => llama(config), { dtype })
        const numbers = model.numParameters()
        if (config['quantization_config']) {
          const quantization = BitsAndBytesConfig.fromJSON(config['quantization_config'])
          const report = replaceWithQuantizedLinear(model, quantization)
          expect(replacedPaths(report).sort()).toEqual(summary.footprint[`${name}.converted`])
        }
        expect([name, getMemoryFootprint(model)]).toEqual([name, summary.footprint[name]])
        expect(model.numParameters()).toBe(numbers)
        expect(getMemoryFootprint(model) - getMemoryFootprint(model, { returnBuffers: false })).toBe(128)
      }
    },
  )
})
