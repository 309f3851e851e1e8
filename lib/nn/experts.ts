/**
 * The MLPs of a mixture of experts in checkpoints that have them in one tensor for each projection:
 *   gate_up_proj [experts, hidden, 2 * intermediate], gate_up_proj_bias [experts, 2 * intermediate]
 *   down_proj [experts, intermediate, hidden], down_proj_bias [experts, hidden]
 * FusedExperts keeps them so; SplitExperts has a linear layer for each expert, which is how they are quantised. Its
 * names are gate_up_projs.0.weight, gate_up_projs.0.bias, ..., and it takes the fused tensors too.
 */
import { needsGrad, noGrad } from '../tensor/autograd.js'
import { concat, linear, type ExpertWeight } from '../tensor/ops.js'
import type { DType } from '../tensor/dtype.js'
import type { Tensor } from '../tensor/tensor.js'
import { keep, tidy } from '../tensor/tidy.js'
import { ModuleList } from './containers.js'
import { ExpertLayers } from './expert_layers.js'
import { runsInPlace } from './hooks.js'
import { kaimingUniform } from './init.js'
import { Conv1D, type Linear } from './linear.js'
import { Module } from './module.js'
import { laidTransposed } from './moving.js'
import { Parameter, type Placement } from './parameter.js'

/** Between the projections: [T, 2 * intermediate] to [T, intermediate]. */
export type ExpertActivation = (gateUp: Tensor) => Tensor

export interface ExpertsOptions {
  count: number
  hiddenSize: number
  intermediateSize: number
  bias: boolean
  activation: ExpertActivation
  dtype?: DType | undefined
  device?: Placement | undefined
}

/** Results [pairs, hidden] of the experts that tokens have chosen: ids int32 [T, k], a pair for each. */
export type ChosenExperts = (ids: Tensor) => Tensor

/** Something that computes experts, on whatever device it has them. */
export interface Experts {
  /** The result of an expert for x [T, hidden]. */
  run(expert: number, x: Tensor): Tensor
  /** What computes the chosen experts alone for x [T, hidden], in so many pairs; undefined where only run() does. */
  chosen(x: Tensor, pairs: number): ChosenExperts | undefined
}

const STACKS = ['gate_up_proj', 'down_proj'] as const
type Stack = (typeof STACKS)[number]

/** Input and output features of a projection. */
function features({ hiddenSize, intermediateSize }: ExpertsOptions, stack: Stack): [number, number] {
  return stack === 'down_proj' ? [intermediateSize, hiddenSize] : [hiddenSize, 2 * intermediateSize]
}

/** Whether a module computes as its class does, where x is. */
function isPlain(module: Module, kind: typeof FusedExperts | typeof SplitExperts, x: Tensor): boolean {
  const own = Object.getPrototypeOf(module) as Module
  return own.forward === (kind.prototype as Module).forward && runsInPlace(module, x.device)
}

/** Both projections of the chosen experts, the activation in between. */
function chosenOf(
  x: Tensor,
  { activation }: ExpertsOptions,
  layersOf: (stack: Stack) => ExpertLayers | undefined,
): ChosenExperts | undefined {
  const gateUp = layersOf('gate_up_proj')
  const down = gateUp && layersOf('down_proj')
  if (!down) return undefined
  return (ids) => tidy(() => down.forward(activation(gateUp.forward(x, ids)), ids))
}

export class FusedExperts extends Module implements Experts {
  gate_up_proj: Parameter
  gate_up_proj_bias: Parameter | null
  down_proj: Parameter
  down_proj_bias: Parameter | null
  readonly _options: ExpertsOptions

  constructor(options: ExpertsOptions) {
    super()
    this._options = options
    const { count, dtype, device } = options
    const make = (k: number, ...shape: number[]) =>
      new Parameter([count, ...shape], { dtype, device, init: kaimingUniform(k) })
    const weight = (stack: Stack) => {
      const [k, n] = features(options, stack)
      return make(k, k, n)
    }
    const bias = (stack: Stack) => {
      const [k, n] = features(options, stack)
      return options.bias ? make(k, n) : null
    }
    this.gate_up_proj = weight('gate_up_proj')
    this.gate_up_proj_bias = bias('gate_up_proj')
    this.down_proj = weight('down_proj')
    this.down_proj_bias = bias('down_proj')
  }

  get numExperts(): number {
    return this._options.count
  }

  /** Weights lie in memory as products want them: [experts, out, in]. */
  override async ownLoad(name: string, tensor: Tensor): Promise<void> {
    const place = STACKS.find((stack) => stack === name) && this[name as Stack]
    if (!place || place.reject(tensor)) return super.ownLoad(name, tensor)
    const { dtype = tensor.dtype, device = tensor.device } = place
    const stored = noGrad(() => tidy(() => laidTransposed(tensor.to({ dtype, device }))))
    if (stored !== tensor) tensor.dispose()
    return super.ownLoad(name, stored)
  }

  /** The weight of one expert [out, in]. */
  #matrix(stack: Stack, expert: number): Tensor {
    const [k, n] = features(this._options, stack)
    return this[stack].value
      .slice(0, expert, expert + 1)
      .permute(0, 2, 1)
      .reshape(n, k)
  }

  #bias(stack: Stack, expert: number): Tensor | undefined {
    const bias = this[`${stack}_bias`]?.value
    return bias?.slice(0, expert, expert + 1).reshape(-1)
  }

  /** A projection of one expert as a layer on the same memory, where there is some; without gradient. */
  layer(stack: Stack, expert: number): Linear {
    const [k, n] = features(this._options, stack)
    const [weight, bias] = [this[stack], this[`${stack}_bias`]]
    const made = new Conv1D(k, n, { bias: bias !== null, device: 'meta' })
    made.weight.retarget(weight)
    if (bias) made.bias!.retarget(bias)
    noGrad(() =>
      tidy(() => {
        if (weight.isLoaded) made.weight.replace(this.#matrix(stack, expert).transpose(0, 1))
        if (bias?.isLoaded) made.bias!.replace(this.#bias(stack, expert))
      }),
    )
    return made
  }

  #project(stack: Stack, expert: number, x: Tensor): Tensor {
    return linear(x, this.#matrix(stack, expert), { bias: this.#bias(stack, expert) })
  }

  chosen(x: Tensor, pairs: number): ChosenExperts | undefined {
    if (!isPlain(this, FusedExperts, x) || needsGrad(x, ...this.#values())) return undefined
    return chosenOf(x, this._options, (stack) => {
      const weights = Array.from({ length: this.numExperts }, (_, e): ExpertWeight => {
        return { kind: 'dense', weight: this.#matrix(stack, e), bias: this.#bias(stack, e) }
      })
      return ExpertLayers.ofWeights(weights, x, pairs)
    })
  }

  *#values(): Generator<Tensor> {
    for (const stack of STACKS) {
      yield this[stack].value
      const bias = this[`${stack}_bias`]
      if (bias) yield bias.value
    }
  }

  forward(expert: number, x: Tensor): Tensor {
    return tidy(() => {
      const inner = this._options.activation(this.#project('gate_up_proj', expert, x))
      return this.#project('down_proj', expert, inner)
    })
  }

  run(expert: number, x: Tensor): Tensor {
    return this.forward(expert, x)
  }
}

/** The same experts with layers of their own, made by `layerOf`; `fused` gives up its memory. */
export class SplitExperts<L extends Linear = Linear> extends Module implements Experts {
  gate_up_projs: ModuleList<L>
  down_projs: ModuleList<L>
  readonly _options: ExpertsOptions

  constructor(fused: FusedExperts, layerOf: (layer: Linear) => L) {
    super()
    this._options = fused._options
    const list = (stack: Stack) =>
      new ModuleList(
        Array.from({ length: fused.numExperts }, (_, expert) => {
          const view = fused.layer(stack, expert)
          const made = layerOf(view)
          view.weight.dispose()
          // a bias of its own, not a part of the stack
          const part = view.bias?.tensor
          if (part) made.bias!.replace(part.clone())
          part?.dispose()
          return made
        }),
      )
    this.gate_up_projs = list('gate_up_proj')
    this.down_projs = list('down_proj')
  }

  get numExperts(): number {
    return this._options.count
  }

  #layers(stack: Stack): ModuleList<L> {
    return stack === 'down_proj' ? this.down_projs : this.gate_up_projs
  }

  chosen(x: Tensor, pairs: number): ChosenExperts | undefined {
    if (!isPlain(this, SplitExperts, x)) return undefined
    return chosenOf(x, this._options, (stack) => ExpertLayers.of([...this.#layers(stack)], x, pairs))
  }

  forward(expert: number, x: Tensor): Tensor {
    return tidy(() => {
      const inner = this._options.activation(this.gate_up_projs.at(expert)!.forward(x))
      return this.down_projs.at(expert)!.forward(inner)
    })
  }

  run(expert: number, x: Tensor): Tensor {
    return this.forward(expert, x)
  }

  // -- loading of fused tensors

  /** Stack and part that a fused tensor is about. */
  #fused(name: string): { stack: Stack; part: 'weight' | 'bias' } | undefined {
    const stack = STACKS.find((each) => name === each || name === `${each}_bias`)
    if (!stack || (name !== stack && !this._options.bias)) return undefined
    return { stack, part: name === stack ? 'weight' : 'bias' }
  }

  override ownAccepts(name: string): boolean {
    return this.#fused(name) !== undefined
  }

  override async ownLoad(name: string, tensor: Tensor): Promise<void> {
    const found = this.#fused(name)
    if (!found) return super.ownLoad(name, tensor)
    const { stack, part } = found
    // all of them or none
    for (const layer of this.#layers(stack)) layer[part]?.refuseOffloaded(tensor)
    const [k, n] = features(this._options, stack)
    const shape = part === 'weight' ? [this.numExperts, k, n] : [this.numExperts, n]
    const whole = new Parameter(shape, { device: 'meta' })
    whole.path = name
    whole.load(tensor)
    // what is turned round and not yet quantised stays a small part of the stack
    const step = Math.ceil(this.numExperts / 8)
    try {
      for (const [expert, layer] of [...this.#layers(stack)].entries()) {
        const own = tidy(() => {
          const view = whole.value.slice(0, expert, expert + 1).reshape(...shape.slice(1))
          // a bias stays as it is, and would keep the memory of all
          return keep(part === 'weight' ? view : view.clone())
        })
        await layer.ownLoad(part, own)
        if (part === 'weight' && (expert + 1) % step === 0) await whole.value.device.synchronize()
      }
    } finally {
      whole.dispose()
    }
  }

  /** Puts the experts together again, from weights as layers have them: [out, in]. */
  fuse(weightOf: (layer: L) => Tensor, dtype?: DType): FusedExperts {
    const fused = new FusedExperts({ ...this._options, device: 'meta' })
    for (const stack of STACKS) {
      const layers = [...this.#layers(stack)]
      if (!layers.every((layer) => layer.weight.isLoaded)) continue
      const [k, n] = features(this._options, stack)
      tidy(() => {
        const weights = layers.map((layer) => weightOf(layer).reshape(1, n, k))
        fused[stack].replace(concat(weights).permute(0, 2, 1))
        const bias = fused[`${stack}_bias`]
        bias?.replace(
          concat(
            layers.map(({ bias: own }) =>
              own!
                .share()
                .to(dtype ?? own!.value.dtype)
                .reshape(1, n),
            ),
          ),
        )
      })
    }
    return fused
  }
}
