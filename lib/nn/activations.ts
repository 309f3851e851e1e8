import { activation, type Activation as Name } from '../tensor/ops.js'
import type { Tensor } from '../tensor/tensor.js'
import { Module } from './module.js'

/** An elementwise function as a module, for Sequential and for configs that name one. */
export class Activation extends Module {
  readonly function: Name

  constructor(name: Name) {
    super()
    this.function = name
  }

  forward(x: Tensor): Tensor {
    return activation(x, this.function)
  }
}

export class SiLU extends Activation {
  constructor() {
    super('silu')
  }
}

export class ReLU extends Activation {
  constructor() {
    super('relu')
  }
}

/** The exact GELU, or its tanh approximation. */
export class GELU extends Activation {
  constructor(approximate: 'none' | 'tanh' = 'none') {
    super(approximate === 'tanh' ? 'gelu_tanh' : 'gelu')
  }
}
