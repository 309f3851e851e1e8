// --expose-gc: loads the small model, generates and disposes it, again and again; says how much memory is left over, in
// bytes for tensors and in MiB for the process and for what its device holds.
const { join } = require('node:path')
const { setTimeout: sleep } = require('node:timers/promises')
const { AutoModelForCausalLM, device } = require('../../../dist/index.js')

const [name, rounds] = [process.argv[2], Number(process.argv[3])]
const folder = join(__dirname, '../../../models/tinypy-2m')
const on = device(name)
const configs = [
  undefined,
  { loadIn4bit: true, bnb4bitQuantType: 'nf4', bnb4bitUseDoubleQuant: true },
  { loadIn8bit: true },
  { loadIn4bit: true, bnb4bitComputeDtype: 'bfloat16' },
]

async function round(i) {
  const quantizationConfig = configs[i % configs.length]
  const model = await AutoModelForCausalLM.fromPretrained(folder, { device: name, quantizationConfig })
  const { text } = await model.generate('def main():', { maxNewTokens: 4 })
  if (typeof text !== 'string' || text.length === 0) throw new Error(`round ${i} gave ${text}`)
  model.dispose()
}

async function held() {
  for (let i = 0; i < 3; i++) {
    globalThis.gc()
    await sleep(1)
  }
  await on.synchronize()
  const { allocated, reserved } = on.memoryUsage()
  const { rss, heapUsed, external } = process.memoryUsage()
  return { allocated, reserved, rss, heap: heapUsed + external }
}

void (async () => {
  const start = await held()
  // what is made once: kernels' state, compiled functions, the pool's blocks
  const warmUp = Math.ceil(rounds / 4)
  for (let i = 0; i < warmUp; i++) await round(i)
  const warm = await held()
  for (let i = warmUp; i < rounds; i++) await round(i)
  const end = await held()
  const grown = (what) => Math.round((end[what] - warm[what]) / 2 ** 20)
  console.log(
    JSON.stringify({
      tensors: end.allocated - start.allocated,
      reserved: grown('reserved'),
      heap: grown('heap'),
      process: grown('rss'),
    }),
  )
})()
