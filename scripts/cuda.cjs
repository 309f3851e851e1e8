// What the builds need to know of CUDA; CMakeLists.txt and binding.gyp ask it, so that both answer alike.
//   node scripts/cuda.cjs build     1 when the CUDA backend is to be built, else 0
//   node scripts/cuda.cjs nvcc      the compiler, or nothing
//   node scripts/cuda.cjs include   the folder of cuda_runtime.h
//   node scripts/cuda.cjs lib       the folder of libcudart_static.a
//   node scripts/cuda.cjs archs     architectures as CMake names them: "80-real;90a-real"
//   node scripts/cuda.cjs flags     the same as nvcc's options
//   node scripts/cuda.cjs compress  nvcc's option for small code in the binary
//
// HALFBYTE_CUDA=ON builds it, OFF does not, AUTO (the default) does where there are both nvcc and a GPU.
// HALFBYTE_CUDA_ARCHS names the architectures; by default those of the GPUs present, without any 80 and 90a.
// CUDA_HOME names the toolkit.
const { spawnSync } = require('node:child_process')
const { existsSync } = require('node:fs')
const { delimiter, dirname, join } = require('node:path')

const homes = [process.env.CUDA_HOME, process.env.CUDA_PATH, '/usr/local/cuda', '/opt/cuda'].filter(Boolean)

function nvcc() {
  const onPath = (process.env.PATH ?? '').split(delimiter).map((folder) => join(folder, 'nvcc'))
  return [...homes.map((home) => join(home, 'bin', 'nvcc')), ...onPath].find((path) => existsSync(path)) ?? ''
}

/** The version of nvcc, [13, 0]. */
function version() {
  const said = spawnSync(nvcc(), ['--version'], { encoding: 'utf8' }).stdout ?? ''
  const [, major, minor] = /release (\d+)\.(\d+)/.exec(said) ?? []
  return [Number(major ?? 0), Number(minor ?? 0)]
}

/** CUDA 12.8 brought the strong compression, with drivers from 12.4 on; before there is one kind. */
function compress() {
  const [major, minor] = version()
  return major > 12 || (major === 12 && minor >= 8) ? '--compress-mode=size' : '-Xfatbin=-compress-all'
}

/**
 * What a published addon is built for: every architecture that nvcc knows of this list (80 serves 86 and 89 too), and PTX
 * of the newest for those to come.
 */
function releaseArchs() {
  const known = spawnSync(nvcc(), ['--list-gpu-code'], { encoding: 'utf8' }).stdout ?? ''
  const numbers = ['75', '80', '90a', '100', '120'].filter((arch) =>
    new RegExp(`^sm_${parseInt(arch)}$`, 'm').test(known),
  )
  const newest = numbers.at(-1)
  return numbers
    .map((arch) => (arch === newest && !arch.endsWith('a') ? arch : `${arch}-real`))
    .concat(newest?.endsWith('a') ? [`${parseInt(newest)}-virtual`] : [])
    .join(';')
}

/** Folders of the toolkit that could hold a file: nvcc on the PATH may be a wrapper that lies elsewhere. */
function find(folders, file) {
  const roots = [...homes, ...(nvcc() ? [dirname(dirname(nvcc()))] : [])]
  return (
    roots
      .flatMap((root) => folders.map((folder) => join(root, folder)))
      .find((at) => existsSync(join(at, file))) ?? ''
  )
}

/** Compute capabilities of the GPUs present, as nvcc numbers them. */
function present() {
  const query = spawnSync('nvidia-smi', ['--query-gpu=compute_cap', '--format=csv,noheader'], {
    encoding: 'utf8',
  })
  if (query.status !== 0) return []
  return [...new Set(query.stdout.match(/\d+\.\d+/g) ?? [])].map((capability) => capability.replace('.', ''))
}

function archs() {
  if (process.env.HALFBYTE_CUDA_ARCHS) return process.env.HALFBYTE_CUDA_ARCHS
  const found = present().map((arch) => (arch === '90' ? '90a-real' : `${arch}-real`))
  return found.length > 0 ? found.join(';') : '80-real;90a-real'
}

function flags() {
  const options = archs()
    .split(';')
    .map((arch) => {
      const [, number, kind] = /^(\d+[af]?)(-real|-virtual)?$/.exec(arch) ?? []
      if (!number)
        throw new Error(`HALFBYTE_CUDA_ARCHS holds ${JSON.stringify(arch)}; write 90a-real, 80-virtual or 89`)
      if (kind === '-virtual') return `-gencode=arch=compute_${number},code=compute_${number}`
      const code = kind === '-real' ? `sm_${number}` : `[sm_${number},compute_${number}]`
      return `-gencode=arch=compute_${number},code=${code}`
    })
  return options.join('\n')
}

function build() {
  const setting = (process.env.HALFBYTE_CUDA || 'AUTO').toUpperCase()
  if (setting === 'ON') return '1'
  return setting === 'AUTO' && nvcc() && present().length > 0 ? '1' : '0'
}

const answers = {
  build,
  nvcc,
  include: () => find(['include', 'targets/x86_64-linux/include'], 'cuda_runtime.h'),
  lib: () => find(['lib64', 'lib', 'targets/x86_64-linux/lib'], 'libcudart_static.a'),
  archs,
  flags,
  compress,
}
if (require.main === module) process.stdout.write(answers[process.argv[2]]())
else module.exports = { ...answers, version, releaseArchs }
