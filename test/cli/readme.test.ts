/** The example of the README runs as it stands. */
import { spawnSync } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { root } from '../support/files'

test('the example of the README generates text', () => {
  const example = /```js\n([\s\S]*?)```/.exec(readFileSync(join(root, 'README.md'), 'utf8'))![1]!
  expect(example.split('\n').length).toBeLessThanOrEqual(16)
  const { stdout, stderr } = spawnSync(process.execPath, ['--input-type=module', '-e', example], {
    cwd: root,
    encoding: 'utf8',
  })
  expect(stderr).toBe('')
  expect(stdout.length).toBeGreaterThan(40)
})
