/** Says whether the CUDA rows of every suite ran, and fails where they had to. */
import { devices, systemInfo } from '../../lib/index.js'

const found = devices().filter((device) => device.type === 'cuda')
const { compiled, reason } = systemInfo().cuda

if (found.length > 0 || process.env['HALFBYTE_REQUIRE_CUDA']) {
  it('has a CUDA device to test', () => {
    expect({ compiled, reason }).toEqual({ compiled: true, reason: '' })
    expect(found.length).toBeGreaterThan(0)
    expect(found[0]!.memoryUsage().total).toBeGreaterThan(0)
  })
} else {
  it.skip(`the CUDA rows of every suite (${reason})`, () => undefined)
}
