/** A small Llama on the disk, made up in the test. */
import { mkdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { writeSafetensors, type Stored } from './safetensors'

export const tinyConfig = {
  model_type: 'llama',
  hidden_size: 64,
  intermediate_size: 96,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  num_hidden_layers: 2,
  vocab_size: 50,
  max_position_embeddings: 128,
  rms_norm_eps: 1e-5,
  rope_theta: 10000,
  tie_word_embeddings: false,
  torch_dtype: 'float32',
  eos_token_id: 2,
}

type Config = Partial<Record<keyof typeof tinyConfig, unknown>> & Record<string, unknown>

/** The weights of a config, from a small generator. */
export function tinyWeights(config: Config = {}): Map<string, Stored> {
  const c = { ...tinyConfig, ...config } as typeof tinyConfig
  let state = 12345
  const random = () => {
    state = (Math.imul(state, 1103515245) + 12345) >>> 0
    return state / 2 ** 32 - 0.5
  }
  const make = (...shape: number[]): Stored => {
    const size = shape.reduce((a, b) => a * b, 1)
    const values = Float32Array.from({ length: size }, () => (shape.length === 1 ? 1 : 0) + 0.3 * random())
    return { dtype: 'F32', shape, data: values }
  }
  const head = c.hidden_size / c.num_attention_heads
  const kv = head * c.num_key_value_heads
  const weights = new Map<string, Stored>([['model.embed_tokens.weight', make(c.vocab_size, c.hidden_size)]])
  for (let i = 0; i < c.num_hidden_layers; i++) {
    const at = `model.layers.${i}`
    weights.set(`${at}.input_layernorm.weight`, make(c.hidden_size))
    weights.set(`${at}.self_attn.q_proj.weight`, make(c.hidden_size, c.hidden_size))
    weights.set(`${at}.self_attn.k_proj.weight`, make(kv, c.hidden_size))
    weights.set(`${at}.self_attn.v_proj.weight`, make(kv, c.hidden_size))
    weights.set(`${at}.self_attn.o_proj.weight`, make(c.hidden_size, c.hidden_size))
    weights.set(`${at}.post_attention_layernorm.weight`, make(c.hidden_size))
    weights.set(`${at}.mlp.gate_proj.weight`, make(c.intermediate_size, c.hidden_size))
    weights.set(`${at}.mlp.up_proj.weight`, make(c.intermediate_size, c.hidden_size))
    weights.set(`${at}.mlp.down_proj.weight`, make(c.hidden_size, c.intermediate_size))
  }
  weights.set('model.norm.weight', make(c.hidden_size))
  if (!c.tie_word_embeddings) weights.set('lm_head.weight', make(c.vocab_size, c.hidden_size))
  return weights
}

/** Writes the model into a folder, in as many shards as there are groups of names. */
export function writeTinyModel(
  folder: string,
  config: Config = {},
  weights: ReadonlyMap<string, Stored> = tinyWeights(config),
  shardOf?: (name: string) => string,
): string {
  mkdirSync(folder, { recursive: true })
  writeFileSync(join(folder, 'config.json'), JSON.stringify({ ...tinyConfig, ...config }))
  if (!shardOf) {
    writeSafetensors(join(folder, 'model.safetensors'), weights)
    return folder
  }
  const shards = new Map<string, Map<string, Stored>>()
  for (const [name, tensor] of weights) {
    const shard = shardOf(name)
    shards.set(shard, (shards.get(shard) ?? new Map<string, Stored>()).set(name, tensor))
  }
  for (const [shard, tensors] of shards) writeSafetensors(join(folder, shard), tensors)
  const map = Object.fromEntries([...weights.keys()].map((name) => [name, shardOf(name)]))
  writeFileSync(join(folder, 'model.safetensors.index.json'), JSON.stringify({ weight_map: map }))
  return folder
}
