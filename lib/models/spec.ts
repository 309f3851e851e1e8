/**
 * What a decoder-only transformer is made of. The blocks in decoder.ts are built from it; a family is a function from
 * config.json to one of these.
 */
import type { ConfigReader } from '../checkpoint/config.js'
import type { Activation } from '../tensor/ops.js'
import { readRope, type RopeSpec } from './rope.js'

export interface LayerSpec {
  /** null: no position embedding in this layer. */
  rope: RopeSpec | null
  /** Keys at least this many positions back are not seen; 0: all are. */
  window: number
}

export interface DecoderSpec {
  modelType: string
  vocabSize: number
  hiddenSize: number
  intermediateSize: number
  numHeads: number
  numKeyValueHeads: number
  headDim: number
  maxPositions: number
  layers: LayerSpec[]
  /** The different position embeddings of the layers. */
  ropes: RopeSpec[]
  /** The output head is the embedding table. */
  tieWordEmbeddings: boolean
  activation: Activation
  normEps: number
  /** Added to the norms' weights. */
  normWeightOffset: number
  /** Whether a layer norms what goes into attention and MLP, what comes out, or both. */
  norms: 'input' | 'output' | 'both'
  /** Norms on queries and keys: of each head, or over all heads at once. */
  queryKeyNorm: 'none' | 'head' | 'all'
  qkvBias: boolean
  outputBias: boolean
  mlpBias: boolean
  /** qkv_proj and gate_up_proj in place of separate layers. */
  fusedProjections: boolean
  attentionScale: number
  attentionSoftcap: number
  embeddingScale: number
  /** The scale is a buffer of the embedding, as Gemma has it: it counts in the footprint. */
  embeddingScaleBuffer: boolean
  residualScale: number
  logitScale: number
  logitSoftcap: number
}

const ACTIVATIONS: Readonly<Record<string, Activation>> = {
  silu: 'silu',
  swish: 'silu',
  gelu: 'gelu',
  gelu_new: 'gelu_tanh',
  gelu_fast: 'gelu_tanh',
  gelu_pytorch_tanh: 'gelu_tanh',
  relu: 'relu',
}

export function readActivation(config: ConfigReader, field = 'hidden_act', initial = 'silu'): Activation {
  const name = config.string(field, initial)
  const activation = Object.hasOwn(ACTIVATIONS, name) ? ACTIVATIONS[name] : undefined
  if (!activation) {
    config.fail(`${field} is ${JSON.stringify(name)}; known are ${Object.keys(ACTIVATIONS).join(', ')}`)
  }
  return activation
}

/** Beyond these a config is damaged; the memory for its model would be asked for before the tensors are looked at. */
const MOST_LAYERS = 10_000
const MOST_HEAD_DIM = 65_536

/** The fields that all families share, as Llama has them; `own` is what differs. */
export function readDecoderSpec(
  config: ConfigReader,
  own: Partial<DecoderSpec> & { partialRotaryFactor?: number } = {},
): DecoderSpec {
  const hiddenSize = config.count('hidden_size')
  const numHeads = config.count('num_attention_heads')
  const numKeyValueHeads = config.count('num_key_value_heads', numHeads)
  const each = hiddenSize % numHeads === 0 ? hiddenSize / numHeads : undefined
  const headDim = config.count('head_dim', each, MOST_HEAD_DIM)
  if (numHeads % numKeyValueHeads !== 0) {
    config.fail(`num_attention_heads ${numHeads} is not a multiple of num_key_value_heads ${numKeyValueHeads}`)
  }
  const maxPositions = config.count('max_position_embeddings', 2048)
  const { partialRotaryFactor, ...rest } = own
  const spec: DecoderSpec = {
    modelType: config.string('model_type'),
    vocabSize: config.count('vocab_size'),
    hiddenSize,
    intermediateSize: config.count('intermediate_size'),
    numHeads,
    numKeyValueHeads,
    headDim,
    maxPositions,
    layers: [],
    ropes: [],
    tieWordEmbeddings: config.boolean('tie_word_embeddings', false),
    activation: rest.activation ?? readActivation(config),
    normEps: config.positive('rms_norm_eps', 1e-6),
    normWeightOffset: 0,
    norms: 'input',
    queryKeyNorm: 'none',
    qkvBias: config.boolean('attention_bias', false),
    outputBias: config.boolean('attention_bias', false),
    mlpBias: config.boolean('mlp_bias', false),
    fusedProjections: false,
    attentionScale: 1 / Math.sqrt(headDim),
    attentionSoftcap: 0,
    embeddingScale: 1,
    embeddingScaleBuffer: false,
    residualScale: 1,
    logitScale: 1,
    logitSoftcap: 0,
    ...rest,
  }
  if (!rest.layers) {
    const rope = readRope(config, { headDim, maxPositions, ...(partialRotaryFactor && { partialRotaryFactor }) })
    spec.ropes = [rope]
    spec.layers = readWindows(config).map((window) => ({ rope, window }))
  }
  return spec
}

/**
 * The window of each layer: layer_types where the config has them, else sliding_window for all, unless
 * use_sliding_window turns it off.
 */
export function readWindows(config: ConfigReader): number[] {
  const layers = config.count('num_hidden_layers', undefined, MOST_LAYERS)
  const slides = config.boolean('use_sliding_window', true) && config.number('sliding_window', 0) !== 0
  const window = slides ? config.count('sliding_window') : 0
  const types = config.array('layer_types')
  if (types && types.length !== layers) {
    config.fail(`layer_types has ${types.length} entries, num_hidden_layers is ${layers}`)
  }
  return Array.from({ length: layers }, (_, i) => (types && types[i] !== 'sliding_attention' ? 0 : window))
}
