/** Tokens per second of one sequence, reading a prompt and generating after it, for each form of the weights. */
import { runAsProgram, type Benchmark, type Row } from './support/benchmark.js'
import { summarize } from './support/measure.js'
import { forms, load, prompt } from './support/models.js'

const PROMPT = 256
const NEW = 64

export const generate: Benchmark = {
  name: 'generate',
  summary: `tokens per second after a prompt of ${PROMPT} tokens, ${NEW} new ones, greedy, batch 1`,
  async run({ device, model: folder, rounds }) {
    const models = []
    for (const [weights, config] of forms) models.push({ weights, model: await load(folder, device, config) })
    const times = models.map(() => ({ prefill: [] as number[], decode: [] as number[] }))
    for (let round = 0; round <= rounds; round++) {
      for (const [i, { model }] of models.entries()) {
        const began = performance.now()
        let first = 0
        let tokens = 0
        const stream = model.stream(prompt(model, PROMPT), {
          maxNewTokens: NEW,
          doSample: false,
          eosTokenId: null,
        })
        for await (const _part of stream) {
          first ||= performance.now()
          tokens++
        }
        if (round === 0) continue // warms up
        times[i]!.prefill.push((first - began) / 1e3 / PROMPT)
        times[i]!.decode.push((performance.now() - first) / 1e3 / (tokens - 1))
      }
    }
    const baseline = 1 / summarize(times[0]!.decode).min
    const rows: Row[] = models.map(({ weights }, i) => {
      const decode = summarize(times[i]!.decode)
      return {
        weights,
        prompt_tokens_per_s: 1 / summarize(times[i]!.prefill).min,
        tokens_per_s: 1 / decode.min,
        median_tokens_per_s: 1 / decode.median,
        fp32_tokens_per_s: baseline,
        speedup: 1 / decode.min / baseline,
      }
    })
    for (const { model } of models) model.dispose()
    return {
      columns: {
        weights: 'weights',
        prompt_tokens_per_s: 'prompt tokens/s',
        tokens_per_s: 'tokens/s',
        median_tokens_per_s: 'median',
        fp32_tokens_per_s: 'fp32 tokens/s',
        speedup: 'times faster',
      },
      rows,
      baseline: 'fp32_tokens_per_s',
      notes: [],
    }
  },
}

runAsProgram(generate, module)
