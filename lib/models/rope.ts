/**
 * Rotary position embeddings (arXiv 2104.09864): the inverse frequencies of each scaling type. config.json has them
 * under rope_parameters, or under rope_theta and rope_scaling in older files.
 */
import type { ConfigReader } from '../checkpoint/config.js'

export interface RopeSpec {
  /** Elements of a head that are rotated. */
  dim: number
  /** One frequency for each pair of them. */
  inverseFrequencies: Float32Array
  /** Factor on cos and sin. */
  scale: number
  /** Pairs are neighbours (2i, 2i + 1), not (i, i + dim / 2). */
  interleaved: boolean
}

export interface RopeOptions {
  headDim: number
  maxPositions: number
  /** Share of a head that is rotated, where the config does not say. */
  partialRotaryFactor?: number
  /** Base where the config does not say. */
  theta?: number
  /** Default false. */
  interleaved?: boolean
}

/** Reads `rope_parameters` (or one of its parts, for layers of a kind) and computes the frequencies. */
export function readRope(config: ConfigReader, options: RopeOptions, part?: string): RopeSpec {
  const whole = config.object('rope_parameters')
  const parameters = (part === undefined ? undefined : whole?.object(part)) ?? whole
  // older files: rope_theta at the top, rope_scaling for everything else, `type` for rope_type
  const older = config.object('rope_scaling')
  const source = parameters ?? older
  const theta = parameters?.get('rope_theta') !== undefined ? parameters : config
  const partial = parameters?.get('partial_rotary_factor') !== undefined ? parameters : config
  const base = theta.positive('rope_theta', options.theta ?? 10000)
  const factor = partial.number('partial_rotary_factor', options.partialRotaryFactor ?? 1)
  const dim = Math.floor(options.headDim * factor)
  if (dim < 2 || dim % 2 !== 0 || dim > options.headDim) {
    config.fail(
      `a head of ${options.headDim} with partial_rotary_factor ${factor} has no even number of rotated elements`,
    )
  }
  const plain = Float64Array.from({ length: dim / 2 }, (_, i) => base ** ((-2 * i) / dim))
  const name = source?.get('rope_type') !== undefined ? 'rope_type' : 'type'
  const type = source?.string(name, 'default') ?? 'default'
  const scaling = Object.hasOwn(SCALINGS, type) ? SCALINGS[type] : undefined
  if (!scaling) {
    config.fail(
      `rope_type ${JSON.stringify(type)} is not known; known are ${Object.keys(SCALINGS).join(', ')}`,
    )
  }
  const { frequencies, scale } = scaling(plain, source ?? config, { ...options, base, dim })
  const { interleaved = false } = options
  return { dim, inverseFrequencies: Float32Array.from(frequencies), scale, interleaved }
}

type Scaling = (
  plain: Float64Array,
  config: ConfigReader,
  options: RopeOptions & { base: number; dim: number },
) => { frequencies: Float64Array; scale: number }

/** Wave lengths shorter than the trained context stay, long ones are stretched by `factor`, those between blend. */
const llama3: Scaling = (plain, config, { maxPositions }) => {
  const factor = config.positive('factor')
  const low = config.positive('low_freq_factor')
  const high = config.positive('high_freq_factor')
  const trained = config.positive('original_max_position_embeddings', maxPositions)
  if (high <= low) config.fail(`high_freq_factor ${high} must be above low_freq_factor ${low}`)
  const frequencies = plain.map((frequency) => {
    const waves = (trained * frequency) / (2 * Math.PI)
    const blend = Math.min(1, Math.max(0, (waves - low) / (high - low)))
    return blend * frequency + ((1 - blend) * frequency) / factor
  })
  return { frequencies, scale: 1 }
}

/** YaRN (arXiv 2309.00071): fast dimensions keep their frequency, slow ones are interpolated, a ramp lies between. */
const yarn: Scaling = (plain, config, { maxPositions, base, dim }) => {
  const trained = config.positive('original_max_position_embeddings', maxPositions)
  const factor = config.positive('factor', maxPositions / trained)
  const dimensionOf = (rotations: number) =>
    (dim * Math.log(trained / (rotations * 2 * Math.PI))) / (2 * Math.log(base))
  let low = dimensionOf(config.positive('beta_fast', 32))
  let high = dimensionOf(config.positive('beta_slow', 1))
  if (config.boolean('truncate', true)) [low, high] = [Math.floor(low), Math.ceil(high)]
  low = Math.max(low, 0)
  high = Math.min(high, dim - 1)
  const width = high === low ? 0.001 : high - low
  const frequencies = plain.map((frequency, i) => {
    const interpolated = Math.min(1, Math.max(0, (i - low) / width))
    return (interpolated * frequency) / factor + (1 - interpolated) * frequency
  })
  const attention = (m: number) => (factor <= 1 ? 1 : 0.1 * m * Math.log(factor) + 1)
  const mscale = config.number('mscale', 0)
  const all = config.number('mscale_all_dim', 0)
  const own = mscale > 0 && all > 0 ? attention(mscale) / attention(all) : attention(1)
  return { frequencies, scale: config.number('attention_factor', own) }
}

const SCALINGS: Readonly<Record<string, Scaling>> = {
  default: (plain) => ({ frequencies: plain, scale: 1 }),
  linear: (plain, config) => {
    const factor = config.positive('factor')
    return { frequencies: plain.map((frequency) => frequency / factor), scale: 1 }
  },
  // scales only beyond max_position_embeddings, where no prompt is accepted
  dynamic: (plain) => ({ frequencies: plain, scale: 1 }),
  llama3,
  yarn,
}
