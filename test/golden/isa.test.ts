/** Every instruction set gives the same bytes: the same inputs in processes that are forced to one each. */
import { execFileSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { root } from '../support/files.js'

interface Result {
  isa: string
  vnni: boolean
  complaint: string
  digests: Record<string, string>
}

function run(isa: string, vnni = 'off'): Result {
  const env = { ...process.env, HALFBYTE_CPU_ISA: isa, HALFBYTE_CPU_VNNI: vnni, HALFBYTE_DEVICE: 'cpu' }
  const script = join(root, 'test', 'support', 'codes.cjs')
  return JSON.parse(execFileSync(process.execPath, [script], { env, encoding: 'utf8' })) as Result
}

const built = existsSync(join(root, 'dist', 'index.js'))
const plain = built ? run('plain') : undefined

describe.each([
  ['avx2', 'off'],
  ['avx2', 'on'],
  ['avx512', 'off'],
  ['avx512', 'on'],
])('%s, VNNI %s', (isa, vnni) => {
  const result = built ? run(isa, vnni) : undefined
  const asked = result?.isa === isa && result.vnni === (vnni === 'on')
  const reason = !built ? 'dist is not built' : asked ? '' : result!.complaint
  const test = reason ? it.skip : it
  test(`gives the bytes of plain${reason && ` (${reason})`}`, () => {
    expect(plain!.isa).toBe('plain')
    expect(Object.keys(plain!.digests).length).toBeGreaterThan(100)
    expect(result!.digests).toEqual(plain!.digests)
  })
})
