// What the set-up needs from the machine, and a plain sentence for what is missing.
import { spawnSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { resolve } from 'node:path'
import cuda from '../cuda.cjs'
import { SetupError } from './run.mjs'

export const minNode = [20, 19]
const minCmake = [3, 24]
const minCuda = [12, 4]

/** First line of `command --version`, or undefined when it does not run. */
function version(command) {
  const result = spawnSync(command, ['--version'], { encoding: 'utf8' })
  return result.status === 0 ? result.stdout.split('\n')[0] : undefined
}

function atLeast(text, [major, minor]) {
  const found = /(\d+)\.(\d+)/.exec(text ?? '')
  if (!found) return false
  return Number(found[1]) > major || (Number(found[1]) === major && Number(found[2]) >= minor)
}

export function checkNode() {
  if (atLeast(process.versions.node, minNode)) return
  throw new SetupError(
    `halfbyte needs Node ${minNode.join('.')} or newer; this is ${process.version} (${process.execPath}).`,
  )
}

/** The C++17 compiler: CXX, or the first of c++, g++ and clang++ that compiles a C++17 line. */
export function findCompiler() {
  const wanted = process.env.CXX
  const names = wanted ? [wanted] : ['c++', 'g++', 'clang++']
  const tried = []
  for (const name of names) {
    const [command, ...flags] = name.split(/\s+/)
    const result = spawnSync(command, [...flags, '-std=c++17', '-fsyntax-only', '-x', 'c++', '-'], {
      input: '#include <optional>\nstd::optional<int> x;\n',
      encoding: 'utf8',
    })
    if (result.status === 0) return name
    tried.push(`${name}: ${result.error ? 'not found' : 'cannot compile C++17'}`)
  }
  throw new SetupError(
    `halfbyte needs a C++17 compiler to build its addon (${tried.join(', ')}).\n` +
      'Debian, Ubuntu: apt-get install g++   Fedora: dnf install gcc-c++   macOS: xcode-select --install',
  )
}

/** 'cmake' when CMake is new enough, else 'gyp' when Python is there. */
export function findBuilder() {
  const cmake = version('cmake')
  if (atLeast(cmake, minCmake)) return 'cmake'
  if (version(process.env.PYTHON || 'python3') ?? version('python')) return 'gyp'
  throw new SetupError(
    `halfbyte builds its addon with CMake ${minCmake.join('.')} or newer (${cmake ?? 'not found'}) ` +
      'or with node-gyp, which needs Python 3 (not found).\nDebian, Ubuntu: apt-get install cmake make',
  )
}

export const hasCcache = () => version('ccache') !== undefined

/** Folder of this Node's headers for node-gyp; undefined when they are not installed with it (it downloads them). */
export function nodeHeaders() {
  const folder = resolve(process.execPath, '../..')
  return existsSync(`${folder}/include/node/node_api.h`) ? folder : undefined
}

/**
 * Whether the CUDA backend is to be built, and for which GPUs ('' when not). HALFBYTE_CUDA: AUTO builds it where there
 * are nvcc and a GPU to run it, ON wherever there is nvcc, OFF never; scripts/cuda.cjs decides.
 */
export function cudaSetting() {
  const setting = (process.env.HALFBYTE_CUDA || 'AUTO').toUpperCase()
  if (!['ON', 'OFF', 'AUTO'].includes(setting)) {
    throw new SetupError(`HALFBYTE_CUDA is ${process.env.HALFBYTE_CUDA}; it may be ON, OFF or AUTO.`)
  }
  if (cuda.build() === '0') return ''
  if (!cuda.nvcc()) {
    throw new SetupError(
      'HALFBYTE_CUDA is ON, but there is no nvcc on the PATH nor in /usr/local/cuda: install the CUDA toolkit, name it\n' +
        'by CUDA_HOME, or build the CPU backend alone with HALFBYTE_CUDA=OFF.',
    )
  }
  const [major, minor] = cuda.version()
  if (major < minCuda[0] || (major === minCuda[0] && minor < minCuda[1])) {
    throw new SetupError(
      `The CUDA backend needs nvcc ${minCuda.join('.')} or newer; ${cuda.nvcc()} is ${major}.${minor}. Name a newer one by\n` +
        'CUDA_HOME, or build the CPU backend alone with HALFBYTE_CUDA=OFF.',
    )
  }
  return cuda.archs()
}
