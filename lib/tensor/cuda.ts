/** Why there is no CUDA device, and whether the CPU may stand in for it unasked. */
import { HalfbyteError } from '../errors.js'
import type { CudaFacts } from '../native.js'

/** '13.0' of 13000, '' of 0. */
export function versionName(version: number): string {
  return version > 0 ? `${Math.floor(version / 1000)}.${Math.floor((version % 1000) / 10)}` : ''
}

/**
 * absent: there is nothing to use. driver: the driver is older than the runtime's major version, which no device works
 * with. failure: driver and runtime agree, but the devices cannot be used. undefined: there are devices.
 */
export interface CudaProblem {
  kind: 'absent' | 'driver' | 'failure'
  reason: string
}

export function cudaProblem(facts: CudaFacts): CudaProblem | undefined {
  if (facts.devices > 0) return undefined
  if (!facts.compiled) return { kind: 'absent', reason: 'this build has no CUDA backend' }
  if (facts.driver === 0) return { kind: 'absent', reason: 'no NVIDIA driver is installed' }
  const [found, major] = [facts.driver, facts.runtime].map((version) => Math.floor(version / 1000))
  if (found! < major!) {
    return {
      kind: 'driver',
      reason:
        `the NVIDIA driver supports CUDA ${versionName(facts.driver)}, this build needs ${major}.0 or newer; ` +
        `update the driver, or build with a CUDA ${found} toolkit`,
    }
  }
  if (facts.failure === '') return { kind: 'absent', reason: 'no NVIDIA GPU was found' }
  return { kind: 'failure', reason: `the GPUs cannot be used: ${facts.failure}` }
}

/** The error of asking for a CUDA device where there is none. */
export function cudaError(name: string, { kind, reason }: CudaProblem): HalfbyteError {
  return new HalfbyteError(
    kind === 'driver' ? 'ERR_HALFBYTE_DRIVER' : 'ERR_HALFBYTE_DEVICE',
    `There is no device ${name}: ${reason}. Use 'cpu', or see what \`halfbyte doctor\` says`,
  )
}

/**
 * The device to use when none is named. A machine with a GPU whose driver is too old is not given the CPU instead; of
 * GPUs that fail otherwise `warn` hears.
 */
export function standardDevice(
  names: readonly string[],
  facts: CudaFacts,
  warn: (message: string) => void,
): string {
  const cuda = names.find((name) => name.startsWith('cuda'))
  if (cuda) return cuda
  const problem = cudaProblem(facts)
  if (problem?.kind === 'driver') {
    throw new HalfbyteError(
      'ERR_HALFBYTE_DRIVER',
      `No CUDA device can be used: ${problem.reason}, or set HALFBYTE_DEVICE=cpu`,
    )
  }
  if (problem?.kind === 'failure') warn(`The CPU is used, because ${problem.reason}`)
  return 'cpu'
}
