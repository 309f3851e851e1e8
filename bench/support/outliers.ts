/**
 * A model with activation outliers and unchanged results: some hidden dimensions leave every norm that feeds linear
 * layers `scale` times larger, and those layers' weights for these dimensions are `scale` times smaller. Large language
 * models grow such dimensions by themselves; small ones have to be helped.
 */
import {
  Attention,
  AutoModelForCausalLM,
  DecoderLayer,
  GatedMlp,
  ops,
  tidy,
  Tensor,
  type CausalLM,
  type Parameter,
} from 'halfbyte'

export interface OutlierRecipe {
  dims: readonly number[]
  scale: number
}

/** Three dimensions x 40, as far as the hidden size allows. */
export function recipeFor(hiddenSize: number): OutlierRecipe {
  return { dims: [11, 200, 333].map((dim) => dim % hiddenSize), scale: 40 }
}

/** Changes a float model of the Llama family in place. */
export function plantOutliers(model: CausalLM, { dims, scale }: OutlierRecipe): void {
  const factors = new Float32Array(model.spec.hiddenSize).fill(1)
  for (const dim of dims) factors[dim] = scale
  using up = Tensor.from(factors, { device: model.device! })
  using down = Tensor.from(
    factors.map((factor) => 1 / factor),
    { device: model.device! },
  )
  // broadcast along the rows of a weight, over a norm as it is
  const multiply = (parameter: Parameter, by: Tensor) => {
    tidy(() => void parameter.value.copyFrom(ops.mul(parameter.value.to('float32'), by)))
  }
  for (const layer of model.model.layers) {
    if (!(
      layer instanceof DecoderLayer &&
      layer.mlp instanceof GatedMlp &&
      layer.self_attn instanceof Attention
    )) {
      throw new TypeError(`no outliers for ${model.spec.modelType}: its layers are not Llama's`)
    }
    const { q_proj, k_proj, v_proj } = layer.self_attn
    const { gate_proj, up_proj } = layer.mlp
    multiply(layer.input_layernorm!.weight!, up)
    multiply(layer.post_attention_layernorm.weight!, up)
    for (const linear of [q_proj, k_proj, v_proj, gate_proj, up_proj]) multiply(linear!.weight, down)
  }
}

/** Writes the model in `source` into `target` with outliers, in float32. */
export async function writeOutlierModel(
  source: string,
  target: string,
  recipe?: OutlierRecipe,
): Promise<void> {
  using model = await AutoModelForCausalLM.fromPretrained(source, { dtype: 'float32' })
  plantOutliers(model, recipe ?? recipeFor(model.spec.hiddenSize))
  await model.savePretrained(target)
}
