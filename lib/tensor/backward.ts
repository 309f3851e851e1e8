/** The way back from a result to the leaves, through the nodes that autograd.ts has recorded. */
import { HalfbyteError } from '../errors.js'
import { GradNode, noGrad, type Edge, type Part } from './autograd.js'
import { add } from './ops/elementwise.js'
import { Tensor } from './tensor.js'
import { keep, tidy } from './tidy.js'

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
