/** How clearly a model's routers decide. */
import { Linear, SparseMlp, type CausalLM, type Tensor } from '../../lib'

/** Tokens of a sequence for which some router's last choice and the next best expert are less than `limit` apart. */
export async function routingTies(model: CausalLM, ids: number[], limit: number): Promise<number[]> {
  const seen: Promise<Float32Array>[] = []
  const routers = model.modules().filter((module) => module instanceof SparseMlp)
  for (const { gate } of routers) {
    gate.forward = function (x: Tensor) {
      const logits = Linear.prototype.forward.call(gate, x)
      seen.push(logits.floats())
      return logits
    }
  }
  try {
    model.forward(ids).dispose()
    const ties = new Set<number>()
    for (const logits of await Promise.all(seen)) {
      const experts = logits.length / ids.length
      ids.forEach((_, t) => {
        const sorted = logits
          .slice(t * experts, (t + 1) * experts)
          .sort()
          .reverse()
        const k = model.spec.experts!.perToken
        if (sorted[k - 1]! - sorted[k]! < limit) ties.add(t)
      })
    }
    return [...ties]
  } finally {
    for (const { gate } of routers) Reflect.deleteProperty(gate, 'forward')
  }
}
