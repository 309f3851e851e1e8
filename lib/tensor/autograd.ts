/**
 * Reverse-mode differentiation. An op on tensors that require a gradient makes a node: for each such input, how its
 * gradient follows from the result's, and from which tensors. backward() (backward.ts) walks the nodes from a result to the
 * leaves and adds to their `grad`.
 *
 * Memory   a node shares the tensors that it needs, so results in between may be disposed as ever (tidy() does). It lets
 *          them go with backward(), or when its result is disposed and no later node needs it.
 * Checked  an op without a gradient refuses inputs that require one; memory that an op or a replayed graph has written
 *          to after it was saved is an error in backward(), before any gradient is made.
 */
import { HalfbyteError } from '../errors.js'
import type { Shape } from './shape.js'
import type { Tensor } from './tensor.js'
import { keep, refusePromise } from './tidy.js'

/** How the gradient of one input of an op is made. */
export interface Gradient {
  of: Tensor | undefined
  /** What it is made from besides the gradient of the result. */
  from?: readonly Tensor[]
  /** The gradient of the input, in its shape and dtype; may be `dy` itself or a view of it. Temporaries are freed. */
  by: (dy: Tensor, ...from: Tensor[]) => Tensor
  /** `by` gives that of a part: the shape of the whole, and the view of a part of it. The rest is 0. */
  part?: Part
}

export interface Part {
  shape: Shape
  of: (whole: Tensor) => Tensor
}

export interface Edge {
  /** Where the gradient goes: on to another node, or to a leaf. */
  to: GradNode | Tensor
  by: Gradient['by']
  part: Part | undefined
  saved: { tensor: Tensor; version: number }[]
}

let enabled = true

/** Whether ops are recorded for backward(). */
export function isGradEnabled(): boolean {
  return enabled
}

/** Runs `fn`, which is synchronous, without recording anything for backward(). */
export function noGrad<T>(fn: () => T): T {
  const before = enabled
  enabled = false
  try {
    const result = fn()
    refusePromise('noGrad', result)
    return result
  } finally {
    enabled = before
  }
}

/** @internal Whether an op on these inputs is to be recorded. */
export function needsGrad(...inputs: readonly (Tensor | undefined)[]): boolean {
  return enabled && inputs.some((tensor) => tensor?.requiresGrad)
}

/** @internal Runs an op and notes how to go back through it. No gradient goes to `constants`: they may want none. */
export function record(
  op: string,
  forward: () => Tensor,
  gradients: readonly Gradient[],
  constants: readonly Tensor[] = [],
): Tensor {
  for (const tensor of constants) if (tensor.requiresGrad) throw withoutGradient(op, tensor)
  return noGrad(() => {
    const y = forward()
    const edges = gradients.flatMap(({ of, from = [], by, part }): Edge[] => {
      if (!of?.requiresGrad) return []
      const saved = from.map((tensor) => ({ tensor: keep(tensor.share()), version: tensor.version }))
      return [{ to: of.gradNode ?? of, by, part, saved }]
    })
    y.gradNode = new GradNode(op, edges)
    return y
  })
}

/** @internal */
export class GradNode {
  static #count = 0
  /** Later nodes have higher numbers. */
  readonly id = GradNode.#count++
  readonly op: string
  #edges: readonly Edge[] | undefined
  /** The tensor that it made, and the nodes that go back through it. */
  #users = 1

  constructor(op: string, edges: readonly Edge[]) {
    this.op = op
    this.#edges = edges
    for (const { to } of edges) if (to instanceof GradNode) to.#users++
  }

  /** Where gradients go from here; ERR_HALFBYTE_USAGE when they went already. */
  get edges(): readonly Edge[] {
    if (this.#edges) return this.#edges
    throw new HalfbyteError(
      'ERR_HALFBYTE_USAGE',
      `backward: what ${this.op} had saved was freed by an earlier backward(); ` +
        'call that one with { retainGraph: true }, or compute the result again',
    )
  }

  /** One user more. */
  retain(): void {
    this.#users++
  }

  /** One user less; without any, what it keeps is freed, here and further back. */
  release(): void {
    const open: GradNode[] = [this]
    for (let node = open.pop(); node; node = open.pop()) {
      if (--node.#users > 0) continue
      open.push(...node.#free())
    }
  }

  /** Lets go of what it keeps. */
  free(): void {
    for (const node of this.#free()) node.release()
  }

  /** The nodes that have one user less by it. */
  #free(): GradNode[] {
    const edges = this.#edges ?? []
    this.#edges = undefined
    for (const { saved } of edges) for (const { tensor } of saved) tensor.dispose()
    return edges.map(({ to }) => to).filter((to) => to instanceof GradNode)
  }
}

/** @internal */
export function withoutGradient(op: string, tensor: Tensor): HalfbyteError {
  return new HalfbyteError(
    'ERR_HALFBYTE_UNSUPPORTED',
    `${op}: has no gradient, and ${tensor.toString()} requires one; detach() it, or call the op in noGrad()`,
  )
}
