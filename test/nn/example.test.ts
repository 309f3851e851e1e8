import { main } from '../../examples/custom-model.js'

it("the example of a user's own model patches it and runs it", async () => {
  const lines: string[] = []
  const log = jest.spyOn(console, 'log').mockImplementation((line: string) => void lines.push(line))
  try {
    await main()
  } finally {
    log.mockRestore()
  }
  expect(lines.filter((line) => line.endsWith('Linear -> Linear4bit')).length).toBe(18)
  expect(lines).toContain('head is kept: output head (one score for each row of embed)')
  const [before, after] = [lines[0]!, lines.at(-2)!].map((line) => Number(/: (\d+) bytes/.exec(line)![1]))
  expect(after!).toBeLessThan(before! / 2)
  expect(lines.at(-2)).toContain('float32 [4, 1000]')
  expect(Number(/next token: (\d+)/.exec(lines.at(-1)!)![1])).toBeLessThan(1000)
})
