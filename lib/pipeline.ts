/** pipeline('text-generation', folder): tokenizer and model in one call. */
import { HalfbyteError } from './errors.js'
import { AutoModelForCausalLM, type FromPretrainedOptions } from './models/auto.js'
import type { CausalLM } from './models/causal_lm.js'
import type { GenerateResult, StreamPart } from './generation/generate.js'
import type { GenerateOptions } from './generation/options.js'
import { Tokenizer, type ChatMessage } from './generation/tokenizer.js'

export type PipelineInput = string | readonly ChatMessage[]

export class TextGenerationPipeline implements Disposable {
  readonly model: CausalLM
  readonly tokenizer: Tokenizer

  constructor(model: CausalLM, tokenizer: Tokenizer) {
    this.model = model
    this.tokenizer = tokenizer
  }

  #prompt(input: PipelineInput): string | number[] {
    return typeof input === 'string'
      ? input
      : this.tokenizer.applyChatTemplate(input, { addGenerationPrompt: true })
  }

  /** The continuation of a text, or the answer in a conversation. */
  async run(input: PipelineInput, options: GenerateOptions = {}): Promise<GenerateResult> {
    return this.model.generate(this.#prompt(input), { tokenizer: this.tokenizer, ...options })
  }

  stream(
    input: PipelineInput,
    options: GenerateOptions = {},
  ): AsyncGenerator<StreamPart, GenerateResult, undefined> {
    return this.model.stream(this.#prompt(input), { tokenizer: this.tokenizer, ...options })
  }

  dispose(): void {
    this.model.dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }
}

export async function pipeline(
  task: 'text-generation',
  folder: string | URL,
  options: FromPretrainedOptions = {},
): Promise<TextGenerationPipeline> {
  if (task !== 'text-generation') {
    throw new HalfbyteError(
      'ERR_HALFBYTE_VALUE',
      `pipeline: ${JSON.stringify(task)} is not a task; the task is text-generation`,
    )
  }
  const model = await AutoModelForCausalLM.fromPretrained(folder, options)
  try {
    return new TextGenerationPipeline(model, model.tokenizer ?? (await Tokenizer.fromPretrained(folder)))
  } catch (error) {
    model.dispose()
    throw error
  }
}
