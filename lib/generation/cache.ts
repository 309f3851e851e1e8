/**
 * The paged cache of keys and values. Each layer has a pool [blocks, blockLen, heads, headDim] for keys and one of
 * valueDim for values; a sequence owns a list of block numbers that counts for all layers. Which blocks are free is known on the
 * host only; the device sees block tables.
 */
import { HalfbyteError } from '../errors.js'
import type { Device } from '../tensor/device.js'
import type { DType } from '../tensor/dtype.js'
import type { RaggedBatch } from '../tensor/ops.js'
import { Tensor } from '../tensor/tensor.js'
import { keep } from '../tensor/tidy.js'

const BLOCK_LENGTH = 32

/** Hands out block numbers 0 .. count-1. */
export class BlockAllocator {
  readonly count: number
  readonly #free: number[]

  constructor(count: number) {
    this.count = count
    this.#free = Array.from({ length: count }, (_, i) => count - 1 - i)
  }

  get available(): number {
    return this.#free.length
  }

  /** `n` blocks, the lowest numbers first on a fresh pool. ERR_HALFBYTE_OUT_OF_MEMORY when there are not as many. */
  allocate(n: number): number[] {
    if (n > this.#free.length) {
      throw new HalfbyteError(
        'ERR_HALFBYTE_OUT_OF_MEMORY',
        `KV cache: ${n} blocks are wanted, ${this.#free.length} of ${this.count} are free`,
      )
    }
    return n === 0 ? [] : this.#free.splice(-n).reverse()
  }

  release(blocks: readonly number[]): void {
    for (let i = blocks.length - 1; i >= 0; i--) this.#free.push(blocks[i]!)
  }
}

/** What a layer stores for each token. */
export interface CacheLayer {
  heads: number
  headDim: number
  /** Elements of a value; those of a key where it is not given. */
  valueDim?: number | undefined
  /** Default: that of the cache. */
  device?: Device | undefined
}

export class PagedKvCache implements Disposable {
  readonly keys: readonly Tensor[]
  readonly values: readonly Tensor[]
  readonly blocks: BlockAllocator
  readonly blockLen: number

  constructor(
    layers: readonly CacheLayer[],
    options: { blocks: number; dtype: DType; device: Device; blockLen?: number },
  ) {
    const { blocks, dtype, device, blockLen = BLOCK_LENGTH } = options
    const pool = (heads: number, dim: number, on = device) =>
      keep(Tensor.empty([blocks, blockLen, heads, dim], dtype, on))
    this.keys = layers.map((layer) => pool(layer.heads, layer.headDim, layer.device))
    this.values = layers.map((layer) => pool(layer.heads, layer.valueDim ?? layer.headDim, layer.device))
    this.blocks = new BlockAllocator(blocks)
    this.blockLen = blockLen
  }

  /** Blocks for a sequence of that many tokens. */
  reserve(tokens: number): number[] {
    return this.blocks.allocate(blocksFor(tokens, this.blockLen))
  }

  get nbytes(): number {
    return [...this.keys, ...this.values].reduce((sum, pool) => sum + pool.nbytes, 0)
  }

  dispose(): void {
    for (const pool of [...this.keys, ...this.values]) pool.dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }
}

export function blocksFor(tokens: number, blockLen = BLOCK_LENGTH): number {
  return Math.ceil(tokens / blockLen)
}

/** A sequence's part in a call. */
export interface BatchEntry {
  /** Its tokens in this call. */
  tokens: readonly number[]
  /** Tokens that are cached already. */
  cached: number
  /** Its blocks, with room for both. */
  blocks: readonly number[]
}

/** A packed ragged batch with its tokens, on the device. */
export interface PackedBatch extends Disposable {
  /** int32 [T]. */
  tokens: Tensor
  batch: RaggedBatch
  /** Row of each sequence's last token. */
  lastRows: number[]
}

export function packBatch(entries: readonly BatchEntry[], device: Device): PackedBatch {
  const total = entries.reduce((sum, { tokens }) => sum + tokens.length, 0)
  const columns = Math.max(1, ...entries.map(({ blocks }) => blocks.length))
  const ids = new Int32Array(total)
  const starts = new Int32Array(entries.length + 1)
  const lengths = new Int32Array(entries.length)
  const table = new Int32Array(entries.length * columns)
  entries.forEach(({ tokens, cached, blocks }, s) => {
    ids.set(tokens, starts[s])
    starts[s + 1] = starts[s]! + tokens.length
    lengths[s] = cached + tokens.length
    table.set(blocks, s * columns)
  })
  const from = (data: Int32Array, shape: number[] = [data.length]) =>
    keep(Tensor.from(data, { device, shape }))
  const tokens = from(ids)
  const batch = {
    queryStarts: from(starts),
    lengths: from(lengths),
    blockTable: from(table, [entries.length, columns]),
  }
  return {
    tokens,
    batch,
    lastRows: [...starts.subarray(1)].map((end) => end - 1),
    [Symbol.dispose]() {
      for (const t of [tokens, batch.queryStarts, batch.lengths, batch.blockTable]) t.dispose()
    },
  }
}
