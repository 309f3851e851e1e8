/** What the tests of models with parts on the disk have in common. */
import type { BitsAndBytesConfigOptions } from '../../lib'

/** A tiny model whose layers outweigh the statistics of their blocks. */
export const config = {
  hidden_size: 256,
  intermediate_size: 512,
  num_hidden_layers: 5,
  num_attention_heads: 4,
  vocab_size: 300,
}

export const allowed = { llmInt8EnableFp32CpuOffload: true }

export const forms: [string, BitsAndBytesConfigOptions | undefined][] = [
  ['float32', undefined],
  ['nf4', { loadIn4bit: true, bnb4bitQuantType: 'nf4', ...allowed }],
  ['nf4 double', { loadIn4bit: true, bnb4bitQuantType: 'nf4', bnb4bitUseDoubleQuant: true, ...allowed }],
  ['int8', { loadIn8bit: true, ...allowed }],
]
