/**
 * Reverse-mode differentiation. An op on tensors that require a gradient makes a node: for each such input, how its
 * gradient follows from the result's, and from which tensors. backward() walks the nodes from a result to the leaves
 * and adds to their `grad`.
 *
 * Memory   a node shares the tensors that it needs, so results in between may be disposed as ever (tidy() does). It lets
 *          them go with backward(), or when its result is disposed and no later node needs it.
 * Checked  an op without a gradient refuses inputs that require one; memory that was written to after it was saved is
 *          an error in backward(), never a wrong gradient.
 */
import { HalfbyteError } from '../errors.js'
import { add } from './ops/layout.js'
import { Tensor } from './tensor.js'
import { keep, tidy } from './tidy.js'

/** How the gradient of one input of an op is made. */
export interface Gradient {
  of: Tensor | undefined
  /** What it is made from besides the gradient of the result. */
  from?: readonly Tensor[]
  /** The gradient of the input, in its shape and dtype; may be `dy` itself or a view of it. Temporaries are freed. */
  by: (dy: Tensor, ...from: Tensor[]) => Tensor
}

interface Edge {
  /** Where the gradient goes: on to another node, or to a leaf. */
  to: GradNode | Tensor
  by: Gradient['by']
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
    if (result instanceof Promise) throw new TypeError('noGrad: the function must be synchronous')
    return result
  } finally {
    enabled = before
  }
}

/** @internal Whether an op on these inputs is to be recorded. */
export function needsGrad(...inputs: readonly (Tensor | undefined)[]): boolean {
  return enabled && inputs.some((tensor) => tensor?.requiresGrad)
}

/** @internal Runs an op and notes how to go back through it. */
export function record(op: string, forward: () => Tensor, gradients: readonly Gradient[]): Tensor {
  return noGrad(() => {
    const y = forward()
    const edges = gradients.flatMap(({ of, from = [], by }): Edge[] => {
      if (!of?.requiresGrad) return []
      const saved = from.map((tensor) => ({ tensor: keep(tensor.share()), version: tensor.version }))
      return [{ to: of.gradNode ?? of, by, saved }]
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

/** All nodes behind one, itself included, later ones first: each comes after all that lead to it. */
function nodesBehind(root: GradNode): GradNode[] {
  const seen = new Set([root])
  for (const node of seen) {
    for (const { to } of node.edges) if (to instanceof GradNode) seen.add(to)
  }
  return [...seen].sort((a, b) => b.id - a.id)
}

/** The gradient of one edge, as a tensor of the caller's own. */
function follow(op: string, { to, by, saved }: Edge, dy: Tensor): Tensor {
  for (const { tensor, version } of saved) {
    if (tensor.version === version) continue
    throw new HalfbyteError(
      'ERR_HALFBYTE_USAGE',
      `backward: ${tensor.toString()}, which the gradient of ${op} is made from, was written to since; ` +
        'write to it after backward(), or to a clone()',
    )
  }
  return tidy(() => {
    const made = by(dy, ...saved.map(({ tensor }) => tensor))
    if (to instanceof GradNode) return made === dy ? dy.share() : made
    // a leaf's gradient is its own memory
    return made === dy || made.storageId === dy.storageId || !made.isContiguous ? made.clone() : made
  })
}

function accumulate(old: Tensor | undefined, more: Tensor): Tensor {
  if (!old) return keep(more)
  const sum = keep(add(old, more))
  old.dispose()
  more.dispose()
  return sum
}

function checkGradient(root: Tensor, gradient: Tensor | undefined): void {
  if (!root.requiresGrad) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_USAGE',
      `backward: ${root.toString()} was not computed from a tensor that requires a gradient`,
    )
  }
  if (!gradient && root.size !== 1) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_SHAPE',
      `backward: ${root.toString()} has ${root.size} elements; give the gradient of each`,
    )
  }
  if (gradient && gradient.toString() !== root.toString()) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_SHAPE',
      `backward: the gradient ${gradient.toString()} is not one of ${root.toString()}`,
    )
  }
}

/** @internal Tensor.backward(). */
export function backward(root: Tensor, gradient: Tensor | undefined, retainGraph: boolean): void {
  checkGradient(root, gradient)
  noGrad(() => {
    const seed = keep(gradient ? gradient.share() : Tensor.full(root.shape, 1, root.dtype, root.device))
    if (root.gradNode) walk(root.gradNode, seed, retainGraph)
    else root.grad = accumulate(root.grad, seed.clone())
    seed.dispose()
  })
}

function walk(start: GradNode, seed: Tensor, retainGraph: boolean): void {
  const nodes = nodesBehind(start)
  const pending = new Map<GradNode, Tensor>([[start, seed.share()]])
  // a node is freed after its turn, not with the last node that leads to it
  for (const node of nodes) node.retain()
  try {
    for (const node of nodes) {
      const dy = pending.get(node)!
      for (const edge of node.edges) {
        const made = follow(node.op, edge, dy)
        if (edge.to instanceof GradNode) pending.set(edge.to, accumulate(pending.get(edge.to), made))
        else edge.to.grad = accumulate(edge.to.grad, made)
      }
      dy.dispose()
      pending.delete(node)
      if (!retainGraph) node.free()
    }
  } finally {
    for (const left of pending.values()) left.dispose()
    for (const node of nodes) node.release()
  }
}
