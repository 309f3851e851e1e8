/** Embedding tables in 4 or 8 bits: only the rows that are asked for are dequantised. */
import type { DType } from '../tensor/dtype.js'
import { gatherRows4, gatherRows8 } from '../tensor/ops.js'
import type { Tensor } from '../tensor/tensor.js'
import { Embedding } from './embedding.js'
import { normal } from './init.js'
import { weight4Options, type Quantize4Options } from './linear4bit.js'
import type { PackedWeight, QuantizedWeight } from './packed.js'
import { Parameter, place, type Placement } from './parameter.js'
import { Weight4 } from './weight4.js'
import { packedBytes } from './weight4_parts.js'
import { Weight8 } from './weight8.js'

interface TableOptions {
  /** Of the rows that come out. Default: that of the table before it was quantised. */
  dtype?: DType | undefined
  device?: Placement | undefined
}

export type Embedding4bitOptions = TableOptions & Quantize4Options

/** What tables with a packed weight have in common. */
abstract class QuantizedEmbedding extends Embedding {
  /** The table, of which the parameter holds the codes. */
  protected abstract get packed(): QuantizedWeight

  /** Packs the table of `embedding`, which keeps its own. */
  protected takeOver({ weight }: Embedding): this {
    this.weight.retarget({ device: weight.device })
    if (weight.isLoaded) this.packed.quantize(weight.value)
    return this
  }

  dequantizeWeight(dtype?: DType): Tensor {
    return this.packed.dequantize(dtype)
  }

  override *ownPacked(): IterableIterator<PackedWeight> {
    yield this.packed
  }
}

/** A table [numEmbeddings, embeddingDim] in 4 bits. */
export class Embedding4bit extends QuantizedEmbedding {
  readonly #weight: Weight4

  constructor(numEmbeddings: number, embeddingDim: number, options: Embedding4bitOptions = {}) {
    super(numEmbeddings, embeddingDim, options)
    this.#weight = new Weight4(numEmbeddings, embeddingDim, this.weight, {
      ...weight4Options(options),
      multiplied: false,
    })
    if (!place(options).meta) this.#weight.quantizeValues(normal())
  }

  protected override makeWeight(options: ConstructorParameters<typeof Parameter>[1]): Parameter {
    const numel = this.numEmbeddings * this.embeddingDim
    const shape = [packedBytes(this.numEmbeddings, this.embeddingDim), 1]
    return new Parameter(shape, { dtype: 'uint8', device: options?.device, numel })
  }

  /** The table of `embedding`, which keeps its own. checkFinite() tells whether it held NaN or infinities. */
  static fromEmbedding(embedding: Embedding, options: Embedding4bitOptions = {}): Embedding4bit {
    const { numEmbeddings, embeddingDim, weight } = embedding
    const made = new this(numEmbeddings, embeddingDim, { dtype: weight.dtype, ...options, device: 'meta' })
    return made.takeOver(embedding)
  }

  protected override get packed(): Weight4 {
    return this.#weight
  }

  override forward(ids: Tensor): Tensor {
    return gatherRows4(this.#weight.operand(this.toString()), ids, this.#weight.state!.dtype)
  }
}

export class EmbeddingNF4 extends Embedding4bit {
  constructor(numEmbeddings: number, embeddingDim: number, options: Embedding4bitOptions = {}) {
    super(numEmbeddings, embeddingDim, { ...options, quantType: 'nf4' })
  }
}

export class EmbeddingFP4 extends Embedding4bit {
  constructor(numEmbeddings: number, embeddingDim: number, options: Embedding4bitOptions = {}) {
    super(numEmbeddings, embeddingDim, { ...options, quantType: 'fp4' })
  }
}

/** A table [numEmbeddings, embeddingDim] as int8 rows. */
export class Embedding8bit extends QuantizedEmbedding {
  readonly #weight: Weight8

  constructor(numEmbeddings: number, embeddingDim: number, options: TableOptions = {}) {
    super(numEmbeddings, embeddingDim, options)
    const { meta, dtype, device } = place(options)
    const layout = { keepFloat: false, transposed: false }
    this.#weight = new Weight8(numEmbeddings, embeddingDim, this.weight, { ...layout, dtype, device })
    if (!meta) this.#weight.quantizeValues(normal())
  }

  protected override makeWeight(options: ConstructorParameters<typeof Parameter>[1]): Parameter {
    return new Parameter([this.numEmbeddings, this.embeddingDim], { dtype: 'int8', device: options?.device })
  }

  /** The table of `embedding`, which keeps its own. checkFinite() tells whether it held NaN or infinities. */
  static fromEmbedding(embedding: Embedding, options: TableOptions = {}): Embedding8bit {
    const { numEmbeddings, embeddingDim, weight } = embedding
    const made = new this(numEmbeddings, embeddingDim, { dtype: weight.dtype, ...options, device: 'meta' })
    return made.takeOver(embedding)
  }

  protected override get packed(): Weight8 {
    return this.#weight
  }

  override forward(ids: Tensor): Tensor {
    return this.#weight.with(this.toString(), ({ codes, scb }) =>
      gatherRows8(codes, scb, ids, this.#weight.sourceDtype ?? 'float16'),
    )
  }
}
