/**
 * What a decoder-only transformer is made of. The blocks in decoder.ts are built from it; a family is a function from
 * config.json to one of these.
 */
import type { ConfigReader } from '../checkpoint/config.js'
import type { Activation } from '../tensor/ops.js'
import { readRope, type RopeOptions, type RopeSpec } from './rope.js'

export interface LayerSpec {
  /** null: no position embedding in this layer. */
  rope: RopeSpec | null
  /** Keys at least this many positions back are not seen; 0: all are. */
  window: number
}

/** Attention with keys and values that are made of a common vector of low rank (MLA, arXiv 2405.04434). */
export interface LatentSpec {
  /** Rank of the queries; null: they are made directly. */
  queryRank: number | null
  keyValueRank: number
  /** Elements of a head's queries and keys that are not rotated; the rest, which is, is one for all heads' keys. */
  plainDim: number
  rotaryDim: number
  valueDim: number
}

/** Experts are chosen from the best groups of experts, by sigmoids and a bias that counts in the choice alone. */
export interface GroupRouting {
  groups: number
  /** Groups that experts are chosen from. */
  chosenGroups: number
  /** Factor on the weights. */
  scale: number
}

/** Which experts a token goes to, and with which weights; see SparseMlp. */
export interface ExpertSpec {
  count: number
  /** Experts that a token goes to. */
  perToken: number
  intermediateSize: number
  /** The weights of a token's experts are made to sum to 1. */
  normalize: boolean
  routerBias: boolean
  /** null: the experts with the largest softmax. */
  groupRouting: GroupRouting | null
  /** Intermediate size of an MLP that every token takes besides; 0: there is none. */
  sharedSize: number
  /** The experts lie in one tensor, gate and up taking turns and limited. */
  fused: { limit: number } | null
  /** Layers that have experts; the others have an MLP of intermediateSize. */
  layers: readonly boolean[]
}

/** How transformers rounds in a family, where families differ; followed with bnbExact alone. */
export interface RoundingSpec {
  /** RMS norms round once, after their weight. */
  normOnce?: boolean
  /** Queries are scaled, and rounded, before the scores. */
  scaledQueries?: boolean
  /** The activation is a chain of operations on tensors (gelu_new). */
  activationInSteps?: boolean
  /** A parallel layer adds what comes out of attention and MLP first, its input last. */
  inputLast?: boolean
}

export interface DecoderSpec {
  modelType: string
  /** What checkpoints call modules that the blocks have under another name: { o_proj: 'dense' }. */
  names: Readonly<Record<string, string>>
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
  /** A table of positions is added to the embeddings; position 0 is its row `offset`. */
  learnedPositions: { offset: number } | null
  /** Scores fall linearly with the distance, faster in some heads (ALiBi, arXiv 2108.12409). */
  alibi: boolean
  /** The output head is the embedding table. */
  tieWordEmbeddings: boolean
  headBias: boolean
  activation: Activation
  normType: 'rms' | 'layer'
  normEps: number
  /** Added to the weights of RMS norms. */
  normWeightOffset: number
  /** Of layer norms. */
  normBias: boolean
  /** The embeddings are normed. */
  embeddingNorm: boolean
  /** Whether a layer norms what goes into attention and MLP, what comes out, or both. */
  norms: 'input' | 'output' | 'both'
  /** Attention and MLP of a layer take the same input: through one norm for both, or through one each. */
  parallel: 'no' | 'one norm' | 'two norms'
  latentAttention: LatentSpec | null
  /** Norms on queries and keys: of each head, or over all heads at once. */
  queryKeyNorm: 'none' | 'head' | 'all'
  qkvBias: boolean
  outputBias: boolean
  mlpBias: boolean
  /** Dense weights are stored as [in, out] (Conv1D). */
  transposed: boolean
  /**
   * q_proj, k_proj and v_proj; or one qkv_proj whose rows are all queries, keys and values ('rows'), or for each key head
   * its queries, key and value ('heads').
   */
  projections: 'separate' | 'rows' | 'heads'
  /** gate_proj and up_proj, or one gate_up_proj, or an MLP without a gate; 'flat': without a module of its own. */
  mlp: 'gated' | 'gated in one' | 'plain' | 'flat'
  experts: ExpertSpec | null
  /** Each head has a logit of its own that takes probability and gives no value (self_attn.sinks). */
  attentionSinks: boolean
  attentionScale: number
  attentionSoftcap: number
  embeddingScale: number
  /** The scale is a buffer of the embedding, as Gemma has it: it counts in the footprint. */
  embeddingScaleBuffer: boolean
  residualScale: number
  logitScale: number
  logitSoftcap: number
  rounding: RoundingSpec
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

/** What a family says of its own; how its heads are rotated goes to readRope(). */
type OwnSpec = Partial<DecoderSpec> & { rotary?: Omit<RopeOptions, 'headDim' | 'maxPositions'> }

/** The fields that all families share, as Llama has them; `own` is what differs. */
export function readDecoderSpec(config: ConfigReader, own: OwnSpec = {}): DecoderSpec {
  const hiddenSize = config.count('hidden_size')
  const numHeads = config.count('num_attention_heads')
  const numKeyValueHeads = own.numKeyValueHeads ?? config.count('num_key_value_heads', numHeads)
  const each = hiddenSize % numHeads === 0 ? hiddenSize / numHeads : undefined
  const headDim = config.count('head_dim', each, MOST_HEAD_DIM)
  if (numHeads % numKeyValueHeads !== 0) {
    config.fail(
      `num_attention_heads ${numHeads} is not a multiple of num_key_value_heads ${numKeyValueHeads}`,
    )
  }
  const maxPositions = config.count('max_position_embeddings', 2048)
  const { rotary, ...rest } = own
  const spec: DecoderSpec = {
    modelType: config.string('model_type'),
    names: {},
    vocabSize: config.count('vocab_size'),
    hiddenSize,
    intermediateSize: rest.intermediateSize ?? config.count('intermediate_size'),
    numHeads,
    numKeyValueHeads,
    headDim,
    maxPositions,
    layers: [],
    ropes: [],
    learnedPositions: null,
    alibi: false,
    tieWordEmbeddings: config.boolean('tie_word_embeddings', false),
    headBias: false,
    activation: rest.activation ?? readActivation(config),
    normType: 'rms',
    normEps: config.positive('rms_norm_eps', 1e-6),
    normWeightOffset: 0,
    normBias: true,
    embeddingNorm: false,
    norms: 'input',
    parallel: 'no',
    latentAttention: null,
    queryKeyNorm: 'none',
    qkvBias: config.boolean('attention_bias', false),
    outputBias: config.boolean('attention_bias', false),
    mlpBias: config.boolean('mlp_bias', false),
    transposed: false,
    projections: 'separate',
    mlp: 'gated',
    experts: null,
    attentionSinks: false,
    attentionScale: 1 / Math.sqrt(headDim),
    attentionSoftcap: 0,
    embeddingScale: 1,
    embeddingScaleBuffer: false,
    residualScale: 1,
    logitScale: 1,
    logitSoftcap: 0,
    rounding: {},
    ...rest,
  }
  if (!rest.layers) {
    const rotates = !spec.learnedPositions && !spec.alibi
    const rope = rotates ? readRope(config, { ...rotary, headDim, maxPositions }) : null
    spec.ropes = rope ? [rope] : []
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
