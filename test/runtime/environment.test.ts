/** Settings of the environment, and machines, that the library cannot do with as asked: it says so. */
import { HalfbyteError } from '../../lib/index'
import type { CudaFacts } from '../../lib/native'
import { cudaError, cudaProblem, standardDevice } from '../../lib/tensor/cuda'
import { thrown } from '../support/errors'
import { itCompiled, printed, runScript } from '../support/run'

describe('HALFBYTE_NUM_THREADS', () => {
  const run = (value: string) =>
    runScript('threads.js', [], [], { env: { HALFBYTE_NUM_THREADS: value, HALFBYTE_CPU_ISA: 'plain' } })

  itCompiled.each(['1', '3', '40'])('%s is the size of the pool', async (value) => {
    expect(await run(value)).toEqual(printed(`${value} 2097152\n`))
  })

  itCompiled.each(['abc', '0', '-1', '2.5', '4 threads', '1e9', '99999999999999999999'])(
    '%s is warned of',
    async (value) => {
      const { stdout, stderr, code } = await run(value)
      expect(code).toBe(0)
      expect(stdout).toMatch(/^[1-9]\d* 2097152\n$/)
      expect(stderr).toContain(
        `HalfbyteWarning: HALFBYTE_NUM_THREADS is '${value}'; it must be a whole number from 1 to 1024: ` +
          `${stdout.split(' ')[0]} threads are used`,
      )
    },
  )
})

describe('CUDA', () => {
  const facts: CudaFacts = {
    compiled: true,
    archs: '80-real 90a-real',
    driver: 13000,
    runtime: 13000,
    devices: 0,
    failure: '',
  }
  const old = {
    ...facts,
    driver: 12040,
    failure: 'CUDA driver version is insufficient for CUDA runtime version',
  }
  const never = (message: string) => {
    throw new Error(`warned: ${message}`)
  }

  it('names the driver that is too old and the one that is needed, and does not go on with the CPU', () => {
    const problem = cudaProblem({ ...old, runtime: 13010 })!
    expect(problem.reason).toMatch(/supports CUDA 12\.4, this build needs 13\.0 or newer; update the driver/)
    const asked = cudaError('cuda:0', problem)
    expect(asked).toBeInstanceOf(HalfbyteError)
    expect(asked.code).toBe('ERR_HALFBYTE_DRIVER')
    expect(asked.message).toContain('There is no device cuda:0: the NVIDIA driver supports CUDA 12.4')
    const unasked = thrown(() => standardDevice(['cpu'], old, never))
    expect(unasked.code).toBe('ERR_HALFBYTE_DRIVER')
    expect(unasked.message).toMatch(
      /supports CUDA 12\.4, this build needs 13\.0 .* or set HALFBYTE_DEVICE=cpu/,
    )
  })

  it('works with an older driver of the same major version', () => {
    const minor = { ...facts, runtime: 13020, devices: 1 }
    expect(cudaProblem(minor)).toBeUndefined()
    expect(standardDevice(['cpu', 'cuda:0', 'cuda:1'], minor, never)).toBe('cuda:0')
  })

  it.each<[string, Partial<CudaFacts>, RegExp]>([
    ['is not in the build', { compiled: false, driver: 0, runtime: 0 }, /no CUDA backend/],
    ['has no driver', { driver: 0 }, /no NVIDIA driver/],
    ['has no GPU', {}, /no NVIDIA GPU/],
  ])('leaves work to the CPU where it %s', (_, change, reason) => {
    const there = { ...facts, ...change }
    expect(standardDevice(['cpu'], there, never)).toBe('cpu')
    const error = cudaError('cuda:1', cudaProblem(there)!)
    expect(error.code).toBe('ERR_HALFBYTE_DEVICE')
    expect(error.message).toMatch(reason)
  })

  it('warns where GPUs are there and fail', () => {
    const warnings: string[] = []
    const failing = { ...facts, failure: 'system not yet initialized' }
    expect(standardDevice(['cpu'], failing, (message) => warnings.push(message))).toBe('cpu')
    expect(warnings).toEqual([expect.stringMatching(/CPU is used.*system not yet initialized/)])
    expect(cudaError('cuda:0', cudaProblem(failing)!).message).toContain('system not yet initialized')
  })
})
