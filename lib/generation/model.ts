/** What generating asks of a model; CausalLM is one. */
import type { GenerationDefaults } from '../checkpoint/config.js'
import type { Module } from '../nn/module.js'
import type { Device } from '../tensor/device.js'
import type { DType } from '../tensor/dtype.js'
import type { RaggedBatch } from '../tensor/ops.js'
import type { Tensor } from '../tensor/tensor.js'
import type { CacheLayer, PagedKvCache } from './cache.js'
import type { Tokenizer } from './tokenizer.js'

export interface GeneratingModel extends Module {
  readonly spec: { readonly vocabSize: number; readonly maxPositions: number }
  readonly generationDefaults: GenerationDefaults
  readonly tokenizer: Tokenizer | undefined
  /** The dtype that activations have, and the cache. */
  readonly computeDtype: DType
  cacheLayers(): CacheLayer[]
  readonly model: {
    /** Makes what calls with positions below `maxPosition` need, so that none of it falls into a capture. */
    prepare(maxPosition: number, device: Device): void
    /** Hidden states [T, hidden] of tokens int32 [T]. */
    forward(tokens: Tensor, batch: RaggedBatch, cache: PagedKvCache, maxPosition: number): Tensor
  }
  /** Logits of hidden states. */
  head(hidden: Tensor): Tensor
}
