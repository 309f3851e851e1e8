/** Modules that are nothing but a tree, and what was replaced in one. */
import { Module, type ReplacementReport, type Tensor } from '../../lib/index.js'

/** A module with the given children. */
export class Tree extends Module {
  constructor(children: Record<string, unknown>) {
    super()
    Object.assign(this, children)
  }
  forward(x: Tensor): Tensor {
    return x
  }
}

export const replacedPaths = ({ replaced }: ReplacementReport): string[] => replaced.map(({ path }) => path)
