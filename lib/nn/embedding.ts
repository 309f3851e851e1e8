import { gatherRows } from '../tensor/ops.js'
import type { DType } from '../tensor/dtype.js'
import type { Tensor } from '../tensor/tensor.js'
import { normal } from './init.js'
import { checkFeatures } from './linear.js'
import { Module } from './module.js'
import { Parameter, type Placement } from './parameter.js'

/** Rows of a table [numEmbeddings, embeddingDim] by int32 or int64 ids of any shape. First values: N(0, 1). */
export class Embedding extends Module {
  readonly numEmbeddings: number
  readonly embeddingDim: number
  weight: Parameter

  constructor(
    numEmbeddings: number,
    embeddingDim: number,
    options: { dtype?: DType | undefined; device?: Placement | undefined } = {},
  ) {
    super()
    this.numEmbeddings = checkFeatures(new.target.name, 'numEmbeddings', numEmbeddings)
    this.embeddingDim = checkFeatures(new.target.name, 'embeddingDim', embeddingDim)
    this.weight = this.makeWeight({ ...options, init: normal() })
  }

  protected makeWeight(options: ConstructorParameters<typeof Parameter>[1]): Parameter {
    return new Parameter([this.numEmbeddings, this.embeddingDim], options)
  }

  /** An id out of range gives a row of NaN: ids live on the device, so there is nobody to throw. */
  forward(ids: Tensor): Tensor {
    return gatherRows(this.weight.value, ids)
  }

  override toString(): string {
    return `${this.constructor.name}(${this.numEmbeddings}, ${this.embeddingDim})`
  }
}
