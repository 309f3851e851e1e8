/** What the golden models do not show of the families: fields that are refused, and ways of saying the same. */
import { copyFileSync, mkdirSync } from 'node:fs'
import { join } from 'node:path'
import { AutoModelForCausalLM, CausalLM } from '../../lib'
import { ConfigReader, readConfig } from '../../lib/checkpoint/config'
import { readSpec } from '../../lib/models/families'
import { temporaryFolder } from '../support/files'
import { itWithGolden } from '../support/golden'
import { error } from '../support/golden_model'
import { readSafetensors, writeSafetensors, type Stored } from '../support/safetensors'

const spec = (raw: Record<string, unknown>) => readSpec(new ConfigReader(raw, 'config.json'))

const gpt2 = { model_type: 'gpt2', n_embd: 64, n_head: 4, n_layer: 2, n_positions: 32, vocab_size: 50 }
const opt = {
  model_type: 'opt',
  hidden_size: 64,
  ffn_dim: 128,
  num_attention_heads: 4,
  num_hidden_layers: 2,
  vocab_size: 50,
}
const llama = { ...opt, intermediate_size: 96 }
const falcon = { ...llama, model_type: 'falcon' }

describe('families', () => {
  const temporary = temporaryFolder()

  it.each([
    [{ ...gpt2, scale_attn_by_inverse_layer_idx: true }, /scale_attn_by_inverse_layer_idx/],
    [{ ...gpt2, n_embd: 'many' }, /n_embd is "many", it must be a positive whole number/],
    [{ ...gpt2, n_head: undefined }, /n_head is missing/],
    [{ ...opt, do_layer_norm_before: false }, /do_layer_norm_before/],
    [{ ...opt, word_embed_proj_dim: 32 }, /word_embed_proj_dim/],
    [{ ...falcon, alibi: true }, /alibi/],
    [{ ...llama, model_type: 'cohere', use_qk_norm: true }, /use_qk_norm/],
    [{ ...llama, model_type: 'stablelm', qk_layernorm: true }, /qk_layernorm/],
    [{ ...llama, model_type: 'mamba' }, /"mamba" is not known; known are bloom, /],
  ])('refuses %j', (raw, message) => {
    expect(() => spec(raw)).toThrow(message)
    expect(() => spec(raw)).toThrow(expect.objectContaining({ code: 'ERR_HALFBYTE_CONFIG' }))
  })

  it('reads the fields of older files', () => {
    const neox = { ...llama, model_type: 'gpt_neox', rotary_pct: 0.5, rotary_emb_base: 500 }
    const [rope] = spec(neox).ropes
    expect(rope!.dim).toBe(8)
    expect(rope!.inverseFrequencies[1]).toBeCloseTo(500 ** (-2 / 8), 6)
    expect(spec({ ...gpt2, n_inner: null }).intermediateSize).toBe(256)
    expect(spec({ ...gpt2, n_inner: 99 }).intermediateSize).toBe(99)
  })

  it('counts the key heads of each Falcon', () => {
    expect(spec(falcon)).toMatchObject({ numKeyValueHeads: 1, parallel: 'one norm' })
    expect(spec({ ...falcon, multi_query: false, parallel_attn: false })).toMatchObject({
      numKeyValueHeads: 4,
      parallel: 'no',
    })
    const larger = spec({ ...falcon, new_decoder_architecture: true, num_kv_heads: 2 })
    expect(larger).toMatchObject({ numKeyValueHeads: 2, parallel: 'two norms' })
    expect(larger.names).toMatchObject({ input_layernorm: 'ln_attn', post_attention_layernorm: 'ln_mlp' })
  })

  it('knows which layers of Qwen 3 MoE have experts', () => {
    const moe = { ...llama, model_type: 'qwen3_moe', num_hidden_layers: 4, num_experts: 8 }
    expect(spec(moe).experts).toMatchObject({ count: 8, perToken: 8, layers: [true, true, true, true] })
    expect(spec({ ...moe, decoder_sparse_step: 2, mlp_only_layers: [3] }).experts!.layers).toEqual([
      false,
      true,
      false,
      false,
    ])
  })

  itWithGolden('models/gpt2/config.json', 'ties the head where the config does not say', (path) => {
    const { raw, file } = readConfig(path.replace(/config\.json$/, ''))
    const { tie_word_embeddings: _, ...rest } = raw
    expect(readSpec(new ConfigReader(rest, file)).tieWordEmbeddings).toBe(true)
  })

  itWithGolden(
    'models/gpt2',
    'reads a base model without its prefix, and masks that are stored',
    async (source) => {
      const folder = join(temporary, 'gpt2')
      mkdirSync(folder)
      copyFileSync(join(source, 'config.json'), join(folder, 'config.json'))
      const weights = new Map(
        [...readSafetensors(join(source, 'model.safetensors'))].map(([name, stored]): [string, Stored] => [
          name.replace(/^transformer\./, ''),
          stored,
        ]),
      )
      weights.set('h.0.attn.bias', { dtype: 'U8', shape: [1, 1, 4, 4], data: new Uint8Array(16) })
      weights.set('h.0.attn.masked_bias', { dtype: 'F32', shape: [], data: Float32Array.of(-1e4) })
      writeSafetensors(join(folder, 'model.safetensors'), weights)
      const onWarning = jest.fn()
      using a = await AutoModelForCausalLM.fromPretrained(source, { device: 'cpu' })
      using b = await AutoModelForCausalLM.fromPretrained(folder, { device: 'cpu', onWarning })
      const [x, y] = [a, b].map((model) => model.forward([1, 2, 3]))
      expect(await y!.floats()).toEqual(await x!.floats())
      expect(onWarning).not.toHaveBeenCalled()
      for (const tensor of [x!, y!]) tensor.dispose()
    },
  )

  // 4 heads share 2 keys and values: [group of 2 queries, key, value] twice in one product
  it('takes queries, keys and values of each group from one product', async () => {
    const config = new ConfigReader(
      { ...falcon, new_decoder_architecture: true, num_kv_heads: 2, ffn_hidden_size: 96 },
      'config.json',
    )
    const together = readSpec(config)
    using a = new CausalLM(together, config)
    using b = new CausalLM({ ...together, projections: 'separate' }, config)
    const state = await a.stateDict()
    const dim = 16
    for (const [name, fused] of [...state].filter(([key]) => key.includes('query_key_value'))) {
      const heads = fused.reshape(2, 4 * dim, 64)
      const part = (begin: number, end: number) => heads.slice(1, begin * dim, end * dim).reshape(-1, 64)
      const prefix = name.replace('query_key_value.weight', '')
      state.set(`${prefix}q_proj.weight`, part(0, 2))
      state.set(`${prefix}k_proj.weight`, part(2, 3))
      state.set(`${prefix}v_proj.weight`, part(3, 4))
      state.delete(name)
    }
    await b.loadStateDict(state)
    const ids = [3, 1, 4, 1, 5, 9, 2, 6]
    const [x, y] = [a, b].map((model) => model.eval().forward(ids))
    const [one, other] = [await x!.floats(), await y!.floats()]
    expect(error(one, other).most).toBeLessThan(1e-6)
    expect([...a.namedModules()].map(([path]) => path)).toContain('transformer.h.1.ln_mlp')
  })
})
