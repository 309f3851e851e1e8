/**
 * Writes a checkpoint of random weights in the shape of a published model, bfloat16, in four shards:
 * `node dist/bench/support/checkpoint.js FOLDER [llama3-8b|tiny]`. What is there already is left as it is.
 */
import { closeSync, existsSync, mkdirSync, openSync, writeFileSync, writeSync } from 'node:fs'
import { join } from 'node:path'
import { HalfbyteError } from 'halfbyte'
import { normal } from './random.js'

const SHAPES = {
  /** 16.06 GB. */
  'llama3-8b': {
    hidden_size: 4096,
    intermediate_size: 14336,
    num_hidden_layers: 32,
    num_attention_heads: 32,
    num_key_value_heads: 8,
    vocab_size: 128256,
    max_position_embeddings: 8192,
  },
  /** 3 MB, to try things out. */
  tiny: {
    hidden_size: 256,
    intermediate_size: 512,
    num_hidden_layers: 2,
    num_attention_heads: 4,
    num_key_value_heads: 2,
    vocab_size: 512,
    max_position_embeddings: 512,
  },
}
export type ShapeName = keyof typeof SHAPES

const SHARDS = 4
/** Weights repeat after so many numbers; how fast a weight is read or quantised does not depend on them. */
const BLOCK = 4_000_037

function config(shape: ShapeName): Record<string, unknown> {
  return {
    architectures: ['LlamaForCausalLM'],
    model_type: 'llama',
    ...SHAPES[shape],
    rms_norm_eps: 1e-5,
    rope_theta: 500000,
    hidden_act: 'silu',
    tie_word_embeddings: false,
    bos_token_id: 1,
    eos_token_id: 2,
    torch_dtype: 'bfloat16',
  }
}

function tensors(shape: ShapeName): [name: string, shape: number[]][] {
  const s = SHAPES[shape]
  const keys = (s.hidden_size / s.num_attention_heads) * s.num_key_value_heads
  const list: [string, number[]][] = [['model.embed_tokens.weight', [s.vocab_size, s.hidden_size]]]
  for (let i = 0; i < s.num_hidden_layers; i++) {
    const at = `model.layers.${i}`
    list.push(
      [`${at}.self_attn.q_proj.weight`, [s.hidden_size, s.hidden_size]],
      [`${at}.self_attn.k_proj.weight`, [keys, s.hidden_size]],
      [`${at}.self_attn.v_proj.weight`, [keys, s.hidden_size]],
      [`${at}.self_attn.o_proj.weight`, [s.hidden_size, s.hidden_size]],
      [`${at}.mlp.gate_proj.weight`, [s.intermediate_size, s.hidden_size]],
      [`${at}.mlp.up_proj.weight`, [s.intermediate_size, s.hidden_size]],
      [`${at}.mlp.down_proj.weight`, [s.hidden_size, s.intermediate_size]],
      [`${at}.input_layernorm.weight`, [s.hidden_size]],
      [`${at}.post_attention_layernorm.weight`, [s.hidden_size]],
    )
  }
  list.push(['model.norm.weight', [s.hidden_size]], ['lm_head.weight', [s.vocab_size, s.hidden_size]])
  return list
}

const bytesOf = (shape: readonly number[]) => shape.reduce((a, b) => a * b, 2)

/** BLOCK values as bfloat16, truncated. */
function block(): Buffer {
  const words = new Uint32Array(normal(BLOCK, 0.02).buffer)
  const values = Uint16Array.from(words, (word) => word >>> 16)
  return Buffer.from(values.buffer)
}

function writeShard(path: string, part: readonly [string, number[]][], values: Buffer): void {
  const header: Record<string, unknown> = { __metadata__: { format: 'pt' } }
  let at = 0
  for (const [name, shape] of part) {
    header[name] = { dtype: 'BF16', shape, data_offsets: [at, (at += bytesOf(shape))] }
  }
  const text = Buffer.from(JSON.stringify(header))
  const padded = Buffer.alloc(8 + Math.ceil(text.length / 8) * 8, ' ')
  padded.writeBigUInt64LE(BigInt(padded.length - 8))
  text.copy(padded, 8)
  const file = openSync(path, 'w')
  try {
    writeSync(file, padded)
    for (let left = at, from = 0; left > 0;) {
      const piece = values.subarray(from, from + Math.min(left, values.length - from))
      const written = writeSync(file, piece)
      left -= written
      from = (from + written) % values.length
    }
  } finally {
    closeSync(file)
  }
}

/** Writes the checkpoint unless its config.json, which comes last, is there. */
export function writeCheckpoint(folder: string, shape: ShapeName): void {
  if (existsSync(join(folder, 'config.json'))) return
  mkdirSync(folder, { recursive: true })
  const all = tensors(shape)
  const total = all.reduce((sum, [, s]) => sum + bytesOf(s), 0)
  const values = block()
  const map: Record<string, string> = {}
  let next = 0
  let written = 0
  for (let shard = 1; shard <= SHARDS; shard++) {
    const name = `model-0000${shard}-of-0000${SHARDS}.safetensors`
    const part: [string, number[]][] = []
    while (next < all.length && (written < (total * shard) / SHARDS || part.length === 0)) {
      const tensor = all[next++]!
      part.push(tensor)
      written += bytesOf(tensor[1])
      map[tensor[0]] = name
    }
    writeShard(join(folder, name), part, values)
  }
  const index = { metadata: { total_size: total }, weight_map: map }
  writeFileSync(join(folder, 'model.safetensors.index.json'), JSON.stringify(index, undefined, 2))
  writeFileSync(join(folder, 'config.json'), JSON.stringify(config(shape), undefined, 2))
}

if (require.main === module) {
  const [folder, shape = 'llama3-8b'] = process.argv.slice(2)
  if (folder === undefined || !Object.hasOwn(SHAPES, shape)) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_USAGE',
      `give a folder and one of ${Object.keys(SHAPES).join(', ')}`,
    )
  }
  writeCheckpoint(folder, shape as ShapeName)
}
