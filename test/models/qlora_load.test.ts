import { devices } from '../../lib/index.js'
import { main } from '../../examples/qlora-load.js'

it.each([
  [['--bits', '4', '--bf16'], 'loaded in 4 bits (nf4)', '"bnb_4bit_compute_dtype": "bfloat16"'],
  [['--bits', '8'], 'loaded in 8 bits (llm_int8)', '"llm_int8_threshold": 6'],
])('the example that loads as QLoRA does: %j', async (args, first, field) => {
  const lines: string[] = []
  const log = jest.spyOn(console, 'log').mockImplementation((line: string) => void lines.push(line))
  try {
    await main(['models/tinypy-2m', ...args])
  } finally {
    log.mockRestore()
  }
  expect(lines[0]).toBe(first)
  expect(lines[1]).toContain(field)
  const gpus = devices().filter(({ type }) => type === 'cuda')
  const map = JSON.parse(lines[2]!.replace(/^on /, '')) as Record<string, string>
  expect(new Set(Object.values(map))).toEqual(
    new Set(gpus.length > 0 ? gpus.map(({ name }) => name) : ['cpu']),
  )
  expect(lines).toContain('training through the quantised layers: true')
  expect(lines).toContain('adapters go to down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj')
  const bytes = lines.slice(-2).map((line) => Number(/(\d+) bytes/.exec(line)![1]))
  expect(bytes[0]).toBeLessThan(bytes[1]!)
})
