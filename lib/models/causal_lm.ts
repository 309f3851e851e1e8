/** A decoder with an output head: what every family's model is. */
import type { ConfigReader, GenerationDefaults } from '../checkpoint/config.js'
import type { DeviceMap } from '../checkpoint/device_map.js'
import type { WriteOptions } from '../checkpoint/write.js'
import { HalfbyteError } from '../errors.js'
import { blocksFor, packBatch, PagedKvCache, type CacheLayer } from '../generation/cache.js'
import {
  generate,
  stream,
  type GenerateResult,
  type Prompt,
  type StreamPart,
} from '../generation/generate.js'
import type { GenerateOptions } from '../generation/options.js'
import type { Tokenizer } from '../generation/tokenizer.js'
import { getMemoryFootprint, getTrueFootprint } from '../patch/footprint.js'
import { dequantize, type ReplacementReport } from '../patch/replace.js'
import type { BitsAndBytesConfig } from '../quantization/config.js'
import { Linear } from '../nn/linear.js'
import { Module } from '../nn/module.js'
import { noGrad } from '../tensor/autograd.js'
import type { DType } from '../tensor/dtype.js'
import { activation, concat, crossEntropy, mul } from '../tensor/ops.js'
import { Tensor } from '../tensor/tensor.js'
import { tidy } from '../tensor/tidy.js'
import { Decoder } from './decoder.js'
import { savePretrained } from './save.js'
import type { DecoderSpec } from './spec.js'

function isList(value: unknown): boolean {
  return Array.isArray(value) || ArrayBuffer.isView(value)
}

/** Rows of logits that are in memory at once where only their losses are wanted. */
const LOSS_ROWS = 256

export class CausalLM extends Module {
  model: Decoder
  lm_head: Linear
  readonly spec: DecoderSpec
  /** config.json. */
  readonly config: ConfigReader
  generationDefaults: GenerationDefaults = { eosTokenIds: [] }
  /** Of the folder that the model came from, when there is one. */
  tokenizer: Tokenizer | undefined
  /** How the linear layers are quantised, if they are. */
  quantizationConfig: BitsAndBytesConfig | undefined
  /** What was quantised when the model was loaded, and what was not, and why. */
  replacement: ReplacementReport | undefined
  /** The folder that the model came from. */
  folder: string | undefined
  /** Where its parts are, by module path: { '': 'cuda:0' } for a model on one device. */
  hfDeviceMap: DeviceMap | undefined

  constructor(spec: DecoderSpec, config: ConfigReader) {
    super()
    this._names = spec.names
    this.spec = spec
    this.config = config
    this.model = new Decoder(spec)
    this.lm_head = new Linear(spec.hiddenSize, spec.vocabSize, { bias: spec.headBias })
    if (spec.tieWordEmbeddings) this.lm_head.weight = this.model.embed_tokens.weight
  }

  /** Classes that a device map leaves in one piece. */
  get noSplitModules(): readonly string[] {
    return [...new Set([...this.model.layers].map((layer) => layer.constructor.name))]
  }

  override get dispatch(): 'pipeline' {
    return 'pipeline'
  }

  getOutputEmbeddings(): Module {
    return this.lm_head
  }

  /** What names in checkpoints begin with; those of a base model lack it. */
  get baseModelPrefix(): string {
    return (this._names['model'] ?? 'model').split('.')[0]!
  }

  get isQuantized(): boolean {
    return this.quantizationConfig !== undefined
  }

  get isLoadedIn4bit(): boolean {
    return this.quantizationConfig?.loadIn4bit ?? false
  }

  get isLoadedIn8bit(): boolean {
    return this.quantizationConfig?.loadIn8bit ?? false
  }

  /** 'nf4', 'fp4' or 'llm_int8'; undefined when nothing is quantised. */
  get quantizationMethod(): ReturnType<BitsAndBytesConfig['quantizationMethod']> | undefined {
    return this.quantizationConfig?.quantizationMethod()
  }

  /** Whether gradients pass through the quantised layers, to what is trained beside them. */
  get isQuantizedTrainingEnabled(): boolean {
    return this.isQuantized
  }

  /** Bytes of parameters and buffers, as transformers counts them: without the statistics of packed weights. */
  getMemoryFootprint(options?: { returnBuffers?: boolean }): number {
    return getMemoryFootprint(this, options)
  }

  /** All bytes that the model keeps in memory. */
  getTrueFootprint(): number {
    return getTrueFootprint(this)
  }

  /** Puts dense layers in the place of quantised ones; default dtype: that of the other weights. */
  dequantize(options: { dtype?: DType } = {}): this {
    dequantize(this, { dtype: options.dtype ?? this.computeDtype })
    return this
  }

  /** The dtype that activations have: that of the embeddings. */
  get computeDtype(): DType {
    return this.model.embed_tokens.weight.dtype!
  }

  /** That of what is not quantised, as Python's `model.dtype`. */
  get dtype(): DType {
    return this.computeDtype
  }

  /** What the cache stores of each token, layer by layer. */
  cacheLayers(): CacheLayer[] {
    const { numKeyValueHeads: heads, headDim, layers, latentAttention } = this.spec
    const devices = this.model.layerDevices()
    const valueDim = latentAttention?.valueDim ?? headDim
    return layers.map((_, i) => ({ heads, headDim, valueDim, device: devices[i] }))
  }

  /** Logits of hidden states. */
  head(hidden: Tensor): Tensor {
    return tidy(() => {
      const { logitScale, logitSoftcap } = this.spec
      let logits = this.lm_head.forward(hidden)
      if (logitScale !== 1) logits = mul(logits, logitScale)
      if (logitSoftcap !== 0) logits = mul(activation(mul(logits, 1 / logitSoftcap), 'tanh'), logitSoftcap)
      return logits
    })
  }

  /** Hidden states [T, hidden] of sequences, packed one after the other, after the last norm. */
  hiddenStates(inputIds: readonly (readonly number[])[]): Tensor {
    return this.#states(inputIds, undefined)
  }

  /** The same after the first `layers` layers; 0: the embeddings. */
  layerStates(inputIds: readonly (readonly number[])[], layers: number): Tensor {
    return this.#states(inputIds, layers)
  }

  #states(inputIds: readonly (readonly number[])[], layers: number | undefined): Tensor {
    if (!isList(inputIds)) {
      throw new HalfbyteError('ERR_HALFBYTE_VALUE', `forward: ${String(inputIds)} is not a list of token ids`)
    }
    const sequences = Array.from(inputIds, (ids) => this.#checkIds(ids))
    const device = this.device!
    const longest = Math.max(0, ...sequences.map((ids) => ids.length))
    this.model.prepare(Math.max(1, longest), device)
    return tidy(() => {
      const blocks = sequences.reduce((sum, ids) => sum + blocksFor(ids.length), 0)
      const cache = new PagedKvCache(this.cacheLayers(), { blocks, dtype: this.computeDtype, device })
      const entries = sequences.map((tokens) => ({ tokens, cached: 0, blocks: cache.reserve(tokens.length) }))
      const packed = packBatch(entries, device)
      try {
        return this.model.forward(packed.tokens, packed.batch, cache, longest, layers)
      } finally {
        packed[Symbol.dispose]()
        cache.dispose()
      }
    })
  }

  #checkIds(ids: readonly number[]): readonly number[] {
    const { vocabSize, maxPositions } = this.spec
    if (!isList(ids)) {
      throw new HalfbyteError('ERR_HALFBYTE_VALUE', `forward: ${String(ids)} is not a list of token ids`)
    }
    const bad = ids.find((id) => !Number.isInteger(id) || id < 0 || id >= vocabSize)
    if (bad !== undefined) {
      throw new HalfbyteError(
        'ERR_HALFBYTE_VALUE',
        `forward: token id ${String(bad)}; the model has ids 0 to ${vocabSize - 1}`,
      )
    }
    if (ids.length > maxPositions) {
      throw new HalfbyteError(
        'ERR_HALFBYTE_VALUE',
        `forward: ${ids.length} tokens; the model has positions for ${maxPositions} (max_position_embeddings)`,
      )
    }
    return ids
  }

  /** Logits [T, vocabulary] of one sequence, or of several packed one after the other. */
  forward(inputIds: readonly number[] | readonly (readonly number[])[]): Tensor {
    const flat = isList(inputIds) && (inputIds.length === 0 || typeof inputIds[0] === 'number')
    const nested = flat ? [inputIds as number[]] : inputIds
    return tidy(() => this.head(this.hiddenStates(nested as readonly (readonly number[])[])))
  }

  /** Logits [tokens, vocabulary] of each sequence. */
  logits(inputIds: readonly (readonly number[])[]): Tensor[] {
    return tidy(() => {
      const all = this.forward(inputIds)
      let at = 0
      return inputIds.map((ids) => all.slice(0, at, (at += ids.length)))
    })
  }

  /** float32: -log p of each token but the first of every sequence, packed. */
  tokenLosses(inputIds: readonly (readonly number[])[]): Tensor {
    return tidy(() => {
      // the last token of a sequence predicts nothing, and is not seen by hiddenStates()
      for (const ids of inputIds) this.#checkIds(ids.slice(-1))
      const hidden = this.hiddenStates(inputIds.map((ids) => ids.slice(0, -1)))
      const targets = Int32Array.from(inputIds.flatMap((ids) => ids.slice(1)))
      const wanted = Tensor.from(targets, { device: hidden.device })
      const rows = hidden.shape[0]!
      const losses: Tensor[] = [Tensor.empty([0], 'float32', hidden.device)]
      for (let at = 0; at < rows; at += LOSS_ROWS) {
        const end = Math.min(rows, at + LOSS_ROWS)
        losses.push(
          tidy(() => {
            const logits = this.head(hidden.slice(0, at, end))
            return crossEntropy(logits, wanted.slice(0, at, end).to(logits.device)).to(hidden.device)
          }),
        )
      }
      return concat(losses)
    })
  }

  /** Mean of -log p over the tokens of one sequence but its first. */
  async loss(inputIds: readonly number[]): Promise<number> {
    if (inputIds.length < 2) {
      throw new HalfbyteError('ERR_HALFBYTE_VALUE', `loss: ${inputIds.length} tokens; at least 2 are needed`)
    }
    const losses = noGrad(() => this.tokenLosses([inputIds]))
    try {
      const values = await losses.floats()
      return values.reduce((sum, value) => sum + value, 0) / values.length
    } finally {
      losses.dispose()
    }
  }

  /** New tokens after a prompt, or after each of several. */
  async generate(prompt: Prompt, options?: GenerateOptions): Promise<GenerateResult>
  async generate(prompts: readonly Prompt[], options?: GenerateOptions): Promise<GenerateResult[]>
  async generate(
    input: Prompt | readonly Prompt[],
    options: GenerateOptions = {},
  ): Promise<GenerateResult | GenerateResult[]> {
    if (typeof input !== 'string' && !isList(input)) {
      throw new HalfbyteError(
        'ERR_HALFBYTE_VALUE',
        `generate: the prompt is ${String(input)}, it must be a text, token ids, or a list of such prompts`,
      )
    }
    const single = typeof input === 'string' || typeof input[0] === 'number' || input.length === 0
    const results = await generate(this, single ? [input as Prompt] : (input as readonly Prompt[]), options)
    return single ? results[0]! : results
  }

  /** New tokens after a prompt as they come: `for await (const { text } of model.stream('def '))`. */
  stream(
    prompt: Prompt,
    options: GenerateOptions = {},
  ): AsyncGenerator<StreamPart, GenerateResult, undefined> {
    return stream(this, prompt, options)
  }

  /** Writes weights, configs and the tokenizer into a folder that fromPretrained() and transformers read. */
  async savePretrained(
    folder: string,
    options: Omit<WriteOptions, 'totalParameters'> & { maxShardSize?: number | string } = {},
  ): Promise<void> {
    await savePretrained(this, folder, options)
  }
}
