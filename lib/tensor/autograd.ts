/**
 * Reverse-mode differentiation. An op on tensors that require a gradient makes a node: for each such input, how its
 * gradient follows from the result's, and from which tensors. backward() walks the nodes from a result to the leaves
 * and adds to their `grad`.
 *
 * Memory   a node shares the tensors that it needs, so results in between may be disposed as ever (tidy() does). It lets
 *          them go with backward(), or when its result is disposed and no later node needs it.
 * Checked  an op without a gradient refuses inputs that require one; memory that an op or a replayed graph has written
 *          to after it was saved is an error in backward(), before any gradient is made.
 */
import { HalfbyteError } from '../errors.js'
import { add } from './ops/layout.js'
import { Tensor, withoutGradient, type Shape } from './tensor.js'
import { keep, tidy } from './tidy.js'

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

interface Part {
  shape: Shape
  of: (whole: Tensor) => Tensor
}

interface Edge {
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
    if (result instanceof Promise) {
      result.catch(() => {})
      throw new TypeError('noGrad: the function must be synchronous')
    }
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

/**
 * All nodes behind one, itself included, later ones first: each comes after all that lead to it. What stands in the way
 * of their gradients is found before any is made.
 */
function nodesBehind(root: GradNode): GradNode[] {
  const seen = new Set([root])
  for (const node of seen) {
    for (const { to, saved } of node.edges) {
      for (const { tensor, version } of saved) if (tensor.version !== version) throw written(node.op, tensor)
      if (to instanceof GradNode) seen.add(to)
      else if (to.disposed) throw gone(to)
    }
  }
  return [...seen].sort((a, b) => b.id - a.id)
}

function written(op: string, tensor: Tensor): HalfbyteError {
  return new HalfbyteError(
    'ERR_HALFBYTE_USAGE',
    `backward: ${tensor.toString()}, which the gradient of ${op} is made from, was written to since; ` +
      'write to it after backward(), or to a clone()',
  )
}

function gone(leaf: Tensor): HalfbyteError {
  return new HalfbyteError(
    'ERR_HALFBYTE_DISPOSED',
    `backward: ${leaf.toString()}, which requires a gradient, was disposed; dispose it after backward()`,
  )
}

/** Gradients on their way: of results of nodes, and those that leaves have. */
class Pending {
  readonly #ofNodes = new Map<GradNode, Tensor>()
  /** Made here, so that they can be written to. */
  readonly #own = new Set<Tensor>()

  /** Takes one out. */
  take(node: GradNode): Tensor {
    const dy = this.#ofNodes.get(node)!
    this.#ofNodes.delete(node)
    return dy
  }

  #get(to: GradNode | Tensor): Tensor | undefined {
    return to instanceof GradNode ? this.#ofNodes.get(to) : to.grad
  }

  /** Puts one, which becomes ours, in the place of another, which is disposed. */
  put(to: GradNode | Tensor, gradient: Tensor): void {
    if (to instanceof Tensor) {
      to.grad = gradient
      return
    }
    const old = this.#ofNodes.get(to)
    if (old !== gradient) old?.dispose()
    this.#ofNodes.set(to, keep(gradient))
  }

  /** Adds what goes along an edge. */
  follow({ to, by, part, saved }: Edge, dy: Tensor): void {
    const old = this.#get(to)
    const sum = tidy(() => {
      const made = by(dy, ...saved.map(({ tensor }) => tensor))
      if (part) {
        const whole = old && this.#own.has(old) ? old : this.#whole(part, made, old)
        const at = part.of(whole)
        at.copyFrom(add(at, made))
        return whole
      }
      if (old) return this.#mark(add(old, made))
      if (to instanceof GradNode) return made === dy ? dy.share() : made
      // a leaf's gradient is memory of its own
      return made === dy || made.storageId === dy.storageId || !made.isContiguous ? made.clone() : made
    })
    this.put(to, sum)
  }

  #whole({ shape }: Part, like: Tensor, old: Tensor | undefined): Tensor {
    return this.#mark(old ? old.clone() : Tensor.zeros(shape, like.dtype, like.device))
  }

  #mark(tensor: Tensor): Tensor {
    this.#own.add(tensor)
    return tensor
  }

  dispose(): void {
    for (const left of this.#ofNodes.values()) left.dispose()
  }
}

/** Throws where one tensor cannot be the gradient of another. */
export function checkAlike(what: string, gradient: unknown, of: Tensor): void {
  if (gradient instanceof Tensor && gradient.toString() === of.toString()) return
  const found = gradient instanceof Tensor ? gradient.toString() : typeof gradient
  throw new HalfbyteError(
    'ERR_HALFBYTE_SHAPE',
    `${what}: the gradient is ${found}, not one of ${of.toString()}`,
  )
}

function checkRoot(root: Tensor, gradient: Tensor | undefined): void {
  if (!root.requiresGrad) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_USAGE',
      `backward: ${root.toString()} was not computed from a tensor that requires a gradient`,
    )
  }
  if (gradient !== undefined) checkAlike('backward', gradient, root)
  else if (root.size !== 1) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_SHAPE',
      `backward: ${root.toString()} has ${root.size} elements; give the gradient of each`,
    )
  }
}

/** @internal Tensor.backward(). */
export function backward(root: Tensor, gradient: Tensor | undefined, retainGraph: boolean): void {
  checkRoot(root, gradient)
  noGrad(() => {
    const seed = keep(gradient ? gradient.share() : Tensor.full(root.shape, 1, root.dtype, root.device))
    try {
      if (root.gradNode) walk(root.gradNode, seed, retainGraph)
      else root.grad = root.grad ? add(root.grad, seed) : seed.clone()
    } finally {
      seed.dispose()
    }
  })
}

function walk(start: GradNode, seed: Tensor, retainGraph: boolean): void {
  const nodes = nodesBehind(start)
  const pending = new Pending()
  pending.put(start, seed.share())
  // a node is freed after its turn, not with the last node that leads to it
  for (const node of nodes) node.retain()
  try {
    for (const node of nodes) {
      using dy = pending.take(node)
      for (const edge of node.edges) pending.follow(edge, dy)
      if (!retainGraph) node.free()
    }
  } finally {
    pending.dispose()
    for (const node of nodes) node.release()
  }
}
