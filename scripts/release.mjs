// Builds the addon that a published package carries, anew: the CPU backend, and CUDA kernels for every GPU of
// releaseArchs() in cuda.cjs, compressed. Puts it into prebuilds/.
//
//   node scripts/release.mjs          --gyp or --cmake choose the builder
//
// HALFBYTE_CUDA_ARCHS names other architectures. Takes a few minutes of a core for each.
import { spawnSync } from 'node:child_process'
import { statSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import cuda from './cuda.cjs'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const archs = process.env.HALFBYTE_CUDA_ARCHS || (cuda.nvcc() && cuda.releaseArchs())
if (!archs) {
  process.stderr.write('A release needs nvcc: on the PATH, in /usr/local/cuda, or named by CUDA_HOME.\n')
  process.exit(1)
}
const env = { ...process.env, HALFBYTE_CUDA: 'ON', HALFBYTE_CUDA_ARCHS: archs }
const node = (...args) => {
  const { status } = spawnSync(process.execPath, args, { cwd: root, env, stdio: 'inherit' })
  if (status !== 0) process.exit(status ?? 1)
}
process.stdout.write(`CUDA ${cuda.version().join('.')}: ${archs}\n`)
node('scripts/setup.mjs', '--native', '--clean', ...process.argv.slice(2))
node('scripts/prebuild.mjs')
const path = join(root, 'prebuilds', `${process.platform}-${process.arch}`, 'halfbyte.node')
process.stdout.write(`${path}: ${(statSync(path).size / 2 ** 20).toFixed(1)} MiB\n`)
