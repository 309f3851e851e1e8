import { LayerNorm, RMSNorm } from '../nn/norms.js'
import type { DecoderSpec } from './spec.js'

export type Norm = RMSNorm | LayerNorm

/** The norm of a family, over `size` features. */
export function makeNorm(spec: DecoderSpec, size = spec.hiddenSize): Norm {
  const { normType, normEps: eps, normWeightOffset: weightOffset, normBias: bias } = spec
  const roundsFirst = !spec.rounding.normOnce
  return normType === 'rms'
    ? new RMSNorm(size, { eps, weightOffset, roundsFirst })
    : new LayerNorm(size, { eps, bias })
}
