/**
 * The stack of a decoder-only transformer, once for all families: embeddings, layers, the last norm. Properties have the
 * names of Llama's checkpoints, or those that spec.names gives them. Everything runs on a packed ragged batch over a
 * paged cache; x is [T, hidden].
 */
import type { PagedKvCache } from '../generation/cache.js'
import { Embedding } from '../nn/embedding.js'
import { executionDevice, isSpread } from '../nn/hooks.js'
import { ModuleList } from '../nn/containers.js'
import { Module } from '../nn/module.js'
import { Buffer } from '../nn/parameter.js'
import type { Device } from '../tensor/device.js'
import { add, mul, raggedPositions, type RaggedBatch } from '../tensor/ops.js'
import { Tensor } from '../tensor/tensor.js'
import { tidy } from '../tensor/tidy.js'
import { Alibi } from './alibi.js'
import type { ForwardContext } from './attention.js'
import { makeLayer, type Layer } from './layer.js'
import { makeNorm, type Norm } from './norm.js'
import { RotaryEmbedding } from './rotary.js'
import type { DecoderSpec } from './spec.js'

/** An embedding that is scaled, by a buffer of its own. */
class ScaledEmbedding extends Embedding {
  embed_scale = new Buffer([], { dtype: 'float32', persistent: false })
}

export class Decoder extends Module {
  embed_tokens: Embedding
  embed_positions?: Embedding
  embedding_norm?: Norm
  layers: ModuleList<Layer>
  norm: Norm
  /** One for each kind of position embedding that layers have. */
  rotary_emb: RotaryEmbedding[]
  alibi?: Alibi
  readonly #spec: DecoderSpec
  #spreadOver: Device[] | undefined

  constructor(spec: DecoderSpec) {
    super()
    this._names = spec.names
    this.#spec = spec
    const Table = spec.embeddingScaleBuffer ? ScaledEmbedding : Embedding
    this.embed_tokens = new Table(spec.vocabSize, spec.hiddenSize)
    if (spec.learnedPositions) {
      this.embed_positions = new Embedding(spec.maxPositions + spec.learnedPositions.offset, spec.hiddenSize)
    }
    if (spec.embeddingNorm) this.embedding_norm = makeNorm(spec)
    this.layers = new ModuleList(spec.layers.map((_, i) => makeLayer(spec, i)))
    this.norm = makeNorm(spec)
    this.rotary_emb = spec.ropes.map((rope) => new RotaryEmbedding(rope))
    if (spec.alibi) this.alibi = new Alibi(spec.numHeads)
  }

  override get dispatch(): 'pipeline' {
    return 'pipeline'
  }

  /** The device of each layer's attention, and of its cache; undefined where the model is on one device. */
  layerDevices(): (Device | undefined)[] {
    return [...this.layers].map((layer) => executionDevice(layer.self_attn))
  }

  /** All devices on which something in the layers runs, once a device map has spread the model. */
  #devices(): Device[] {
    if (!isSpread(this)) return []
    this.#spreadOver ??= [
      ...new Set([...this.layers].flatMap((layer) => layer.modules().map(executionDevice))),
    ].filter((device) => device !== undefined)
    return this.#spreadOver
  }

  /** Makes what calls with positions below `maxPosition` need, so that none of it falls into a capture. */
  prepare(maxPosition: number, device: Device): void {
    for (const each of new Set([device, ...this.#devices()])) {
      for (const rotary of this.rotary_emb) rotary.tables(maxPosition, each)
      this.alibi?.forward(each)
    }
    if (this.embed_tokens instanceof ScaledEmbedding && !this.embed_tokens.embed_scale.isLoaded) {
      this.embed_tokens.embed_scale.replace(Tensor.full([], this.#spec.embeddingScale, 'float32', device))
    }
  }

  /** The context of a call. `maxPosition`: no token of the batch, now or in a replay, has this position or a later one. */
  context(batch: RaggedBatch, tokens: number, cache: PagedKvCache, maxPosition: number): ForwardContext {
    const made = new Map<Device, ForwardContext>()
    const make = (here: RaggedBatch): ForwardContext => {
      const positions = raggedPositions(here, tokens)
      const context: ForwardContext = {
        batch: here,
        cache,
        positions,
        alibiSlopes: this.alibi?.forward(positions.device),
        rotate: (x, { rope }) =>
          rope ? this.rotary_emb[this.#spec.ropes.indexOf(rope)]!.forward(x, positions, maxPosition) : x,
        on: (device) => made.get(device)!,
      }
      made.set(positions.device, context)
      return context
    }
    const first = make(batch)
    for (const device of this.#devices()) {
      if (made.has(device)) continue
      const { queryStarts, lengths, blockTable } = batch
      make({
        queryStarts: queryStarts.to(device),
        lengths: lengths.to(device),
        blockTable: blockTable.to(device),
      })
    }
    return first
  }

  /** Hidden states [T, hidden] of tokens int32 [T] after the last norm, or after the first `count` layers. */
  forward(
    tokens: Tensor,
    batch: RaggedBatch,
    cache: PagedKvCache,
    maxPosition: number,
    count?: number,
  ): Tensor {
    return tidy(() => {
      const context = this.context(batch, tokens.size, cache, maxPosition)
      let x = this.embed(tokens, context.positions)
      for (const layer of [...this.layers].slice(0, count)) {
        const next = layer.forward(x, context)
        x.dispose()
        x = next
      }
      return count === undefined ? this.norm.forward(x) : x
    })
  }

  /** What the first layer gets. */
  embed(tokens: Tensor, positions: Tensor): Tensor {
    const { embeddingScale, learnedPositions } = this.#spec
    let x = this.embed_tokens.forward(tokens)
    if (embeddingScale !== 1) x = mul(x, embeddingScale)
    if (this.embed_positions) {
      const offset = learnedPositions!.offset
      const rows = this.embed_positions.forward(offset === 0 ? positions : add(positions, offset))
      x = add(x, rows.to(x.device))
    }
    return this.embedding_norm ? this.embedding_norm.forward(x) : x
  }
}
