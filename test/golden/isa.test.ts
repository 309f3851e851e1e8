/** Every instruction set gives the same bytes: the same inputs in processes that are forced to one each. */
import { execFileSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { root } from '../support/files.js'

interface Result {
  isa: string
  complaint: string
  digests: Record<string, string>
}

function run(isa: string): Result {
  const env = { ...process.env, HALFBYTE_CPU_ISA: isa, HALFBYTE_DEVICE: 'cpu' }
  const script = join(root, 'test', 'support', 'codes.cjs')
  return JSON.parse(execFileSync(process.execPath, [script], { env, encoding: 'utf8' })) as Result
}

const built = existsSync(join(root, 'dist', 'index.js'))
const plain = built ? run('plain') : undefined

describe.each(['avx2', 'avx512'])('%s', (isa) => {
  const result = built ? run(isa) : undefined
  const reason = !built ? 'dist is not built' : result!.isa === isa ? '' : result!.complaint
  const test = reason ? it.skip : it
  test(`gives the bytes of plain${reason && ` (${reason})`}`, () => {
    expect(plain!.isa).toBe('plain')
    expect(Object.keys(plain!.digests).length).toBeGreaterThan(100)
    expect(result!.digests).toEqual(plain!.digests)
  })
})
