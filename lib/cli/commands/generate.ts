/** halfbyte generate: continues a prompt, printing the text as it comes. */
import { readFileSync } from 'node:fs'
import type { CausalLM } from '../../models/index.js'
import { usageError, type Command, type Flags } from '../command.js'
import { describeWeights, loadModel } from '../load.js'
import { modelOptions, samplingFields, samplingOptions } from '../model_options.js'
import { commonOptions } from '../options.js'
import { print, printJson } from '../output.js'
import { Progress } from '../progress.js'
import { formatSeconds } from '../table.js'

/** The prompt: an argument, a file, or what is piped in. */
function readPrompt(argument: string | undefined, flags: Flags): string {
  const given = [argument, flags.text('prompt'), flags.text('prompt-file')].filter((one) => one !== undefined)
  if (given.length > 1) throw usageError('the prompt was given more than once')
  const file = flags.text('prompt-file')
  if (file !== undefined && file !== '-') return readFileSync(file, 'utf8')
  if (file === undefined && given.length === 1) return given[0]!
  if (file === undefined && process.stdin.isTTY) {
    throw usageError(
      'there is no prompt: give it as an argument, with --prompt or --prompt-file, or pipe it in',
    )
  }
  return readFileSync(0, 'utf8')
}

function asChat(model: CausalLM, prompt: string): number[] {
  return model.tokenizer!.applyChatTemplate([{ role: 'user', content: prompt }], {
    addGenerationPrompt: true,
  })
}

export const generate: Command = {
  name: 'generate',
  summary: 'Continues a prompt, printing the text as it is generated. Ctrl-C stops.',
  arguments: 'DIR [PROMPT]',
  count: [1, 2],
  options: [
    [
      'Prompt',
      {
        prompt: { short: 'p', value: 'TEXT', help: 'the prompt, instead of the argument' },
        'prompt-file': { value: 'FILE', help: 'the prompt from a file; - is standard input' },
        chat: { help: "the prompt is a user's message: use the model's chat template" },
      },
    ],
    ['Sampling', samplingOptions],
    ['Model', modelOptions],
    ['Options', commonOptions],
  ],
  notes: `Example: halfbyte generate models/tinypy-2m "def main():" --load-in-4bit --temperature 0.8 --seed 1`,
  async run(invocation) {
    const { positionals, flags, signal } = invocation
    const sampling = samplingFields(flags)
    const prompt = readPrompt(positionals[1], flags)
    const { model, seconds: loadSeconds } = await loadModel(positionals[0]!, invocation)
    const json = flags.switch('json')
    using progress = new Progress('Reading the prompt')
    const began = performance.now()
    let first = 0
    let text = ''
    const tokenIds: number[] = []
    let finishReason: string | undefined
    const input = flags.switch('chat') ? asChat(model, prompt) : prompt
    let shown = false
    try {
      const parts = model.stream(input, {
        ...sampling,
        signal,
        onPrefill: (done, total) => progress.update(done, total),
      })
      for await (const part of parts) {
        if (first === 0) {
          // not before: the line of progress would take the prompt's place
          progress.end()
          first = performance.now()
          shown = !json
          if (shown && !flags.switch('chat')) process.stdout.write(prompt)
        }
        tokenIds.push(part.tokenId)
        text += part.text
        finishReason = part.finishReason
        if (!json) process.stdout.write(part.text)
      }
    } finally {
      if (shown) process.stdout.write('\n')
    }
    const firstSeconds = (first - began) / 1e3
    const restSeconds = (performance.now() - first) / 1e3
    const tokensPerSecond = tokenIds.length > 1 ? (tokenIds.length - 1) / restSeconds : undefined
    if (json) {
      const weights = describeWeights(model)
      printJson({ prompt, text, tokenIds, finishReason, weights, loadSeconds, firstSeconds, tokensPerSecond })
    } else if (process.stdout.isTTY) {
      const speed = tokensPerSecond === undefined ? '' : `, ${tokensPerSecond.toFixed(1)} tokens/s`
      print(
        `\n[${tokenIds.length} tokens, first after ${formatSeconds(firstSeconds)}${speed}; ${describeWeights(model)}]`,
      )
    }
    model.dispose()
  },
}
