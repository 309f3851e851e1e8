/**
 * Rounding where transformers rounds. What is one pass here is several operations there, each of which rounds its result
 * to the dtype. Between LLM.int8() layers that shows: they magnify the last bit (docs/models.md).
 */
import type { Module } from './module.js'

/** A module that can follow the steps of transformers, rounding after each; replaceWithQuantizedLinear() asks for it. */
export interface StepRounding {
  bnbExact: boolean
}

/** All of them in a model, the model itself too. */
export function stepRounding(model: Module): (Module & StepRounding)[] {
  return model.modules().filter((module): module is Module & StepRounding => 'bnbExact' in module)
}
