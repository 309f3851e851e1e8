/**
 * How long JavaScript has to wait while a model generates: gaps between the ticks of a timer of one millisecond, beside
 * those of an idle process.
 */
import { runAsProgram, type Benchmark, type Row } from './support/benchmark.js'
import { forms, load, prompt } from './support/models.js'

/** Ticks of a timer; stop() gives the gaps between them in milliseconds, ascending. */
function ticker(): { stop: () => number[] } {
  const gaps: number[] = []
  let last = performance.now()
  let timer: NodeJS.Timeout
  const tick = () => {
    const now = performance.now()
    gaps.push(now - last)
    last = now
    timer = setTimeout(tick, 1)
  }
  timer = setTimeout(tick, 1)
  return {
    stop: () => {
      clearTimeout(timer)
      return gaps.sort((a, b) => a - b)
    },
  }
}

const quantile = (sorted: readonly number[], q: number) =>
  sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * q))]!

export const eventloop: Benchmark = {
  name: 'eventloop',
  summary: 'gaps of a 1 ms timer while a model generates',
  async run({ device, model: folder, rounds }) {
    const idle = ticker()
    await new Promise((resolve) => setTimeout(resolve, 1000))
    const quiet = idle.stop()
    const rows: Row[] = []
    for (const [weights, config] of forms) {
      const model = await load(folder, device, config)
      const ids = prompt(model, 256)
      let tokens = 0
      const clock = ticker()
      const began = performance.now()
      for (let round = 0; round < rounds; round++) {
        for await (const _part of model.stream(ids, { maxNewTokens: 64, doSample: false, eosTokenId: null }))
          tokens++
      }
      const seconds = (performance.now() - began) / 1e3
      const gaps = clock.stop()
      rows.push({
        weights,
        ticks: gaps.length,
        p50_ms: quantile(gaps, 0.5),
        p99_ms: quantile(gaps, 0.99),
        max_ms: gaps.at(-1)!,
        idle_p99_ms: quantile(quiet, 0.99),
        tokens_per_s: tokens / seconds,
      })
      model.dispose()
    }
    return {
      columns: {
        weights: 'weights',
        ticks: 'ticks',
        p50_ms: 'p50 ms',
        p99_ms: 'p99 ms',
        max_ms: 'longest ms',
        idle_p99_ms: 'idle p99 ms',
        tokens_per_s: 'tokens/s with prompts',
      },
      rows,
      baseline: 'idle_p99_ms',
      notes: [],
    }
  },
}

runAsProgram(eventloop, module)
