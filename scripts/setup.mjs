// Makes a checkout ready to run: installs the npm packages, builds the addon and compiles the TypeScript, each only
// when it is missing or older than what it is made from. Safe to interrupt, and to run twice at once.
//
//   node scripts/setup.mjs            whatever is stale
//   node scripts/setup.mjs --native   the addon alone, always; --gyp or --cmake choose the builder, --clean starts anew
//
// In an installed package, which brings what the addon is made from, --native --gyp works: npm's node-gyp does it.
//
// HALFBYTE_CUDA=ON|OFF|AUTO (default AUTO) says whether to build the CUDA backend; CXX names the compiler.
import { spawnSync } from 'node:child_process'
import { existsSync, lstatSync, readdirSync, rmSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { dirname, join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'
import { acquire } from './setup/lock.mjs'
import { checkNode, cudaSetting, findBuilder, findCompiler, hasCcache, nodeHeaders } from './setup/needs.mjs'
import { run, SetupError, stopChildren } from './setup/run.mjs'
import { hashOf, modulesMatch, Stamp } from './setup/stamp.mjs'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const stamps = join(root, 'build-setup')
const options = new Set(process.argv.slice(2))
const inModules = (path) => join(root, 'node_modules', path)
/** As a package, not as a checkout. */
const installed = !existsSync(join(root, 'package-lock.json'))
const howToBuild =
  'The addon of an installed package is built with: npm explore halfbyte -- npm run build:gyp'

async function installModules() {
  const modules = inModules('')
  if (existsSync(modules) && modulesMatch(root)) return
  if (lstatSync(modules.slice(0, -1), { throwIfNoEntry: false })?.isSymbolicLink()) {
    throw new SetupError(
      'node_modules is a link and does not match package-lock.json: run npm ci where it points.',
    )
  }
  const npm = process.env.npm_execpath
  const args = ['ci', '--no-audit', '--no-fund', '--include=dev']
  if (npm?.endsWith('.js')) await run('Installing packages', process.execPath, [npm, ...args], { cwd: root })
  else await run('Installing packages', 'npm', args, { cwd: root })
}

function findNodeGyp() {
  if (!installed) return inModules('node-gyp/bin/node-gyp.js')
  const own = process.env.npm_config_node_gyp
  if (own) return own
  throw new SetupError(howToBuild)
}

/** Builds the addon and returns its path. */
async function buildWith(builder, clean) {
  const jobs = String(availableParallelism())
  const env = { ...process.env, CXX: findCompiler() }
  if (builder === 'cmake') {
    if (clean) rmSync(join(root, 'build-cmake'), { recursive: true, force: true })
    const args = [inModules('cmake-js/bin/cmake-js'), 'build', '--out', 'build-cmake', '--parallel', jobs]
    await run('Building the addon', process.execPath, args, { cwd: root, env })
    return join(root, 'build-cmake/Release/halfbyte.node')
  }
  if (hasCcache() && !env.CXX.includes('ccache')) env.CXX = `ccache ${env.CXX}`
  const headers = nodeHeaders()
  const args = [findNodeGyp(), ...(clean ? ['clean'] : []), 'configure', 'build', '--jobs', jobs]
  if (headers) args.push(`--nodedir=${headers}`)
  await run('Building the addon', process.execPath, args, { cwd: root, env })
  return join(root, 'build/Release/halfbyte.node')
}

const loads = (binary) =>
  spawnSync(process.execPath, ['-e', `require(${JSON.stringify(binary)})`], { stdio: 'ignore' }).status === 0

async function buildAddon() {
  const forced = options.has('--native')
  const cuda = cudaSetting()
  const sources = ['native', 'kernels', 'CMakeLists.txt', 'binding.gyp']
  const hash = hashOf(root, sources, { cuda, arch: process.arch, platform: process.platform })
  const fresh = ['build-cmake', 'build'].some(
    (folder) => new Stamp(join(stamps, folder), join(root, folder, 'Release/halfbyte.node'), hash).fresh,
  )
  if (fresh && !forced) return

  const builder = options.has('--gyp') ? 'gyp' : options.has('--cmake') ? 'cmake' : findBuilder()
  const folder = builder === 'cmake' ? 'build-cmake' : 'build'
  const stamp = new Stamp(join(stamps, folder), join(root, folder, 'Release/halfbyte.node'), hash)
  stamp.clear()
  // CMake and node-gyp decide on CUDA when they configure: a folder made for another setting starts anew
  const setting = hashOf(root, [], cuda)
  const configured = new Stamp(join(stamps, `${folder}.cuda`), join(root, folder), setting)
  const clean = options.has('--clean') || !configured.fresh
  configured.set()
  const binary = await buildWith(builder, clean)
  // A build that was cut short can leave a binary that looks newer than its sources.
  if (!loads(binary) && !clean) await buildWith(builder, true)
  if (!loads(binary)) {
    const why = spawnSync(process.execPath, ['-e', `require(${JSON.stringify(binary)})`], {
      encoding: 'utf8',
    }).stderr
    throw new SetupError(`${why}\nThe addon was built, but does not load: ${binary}`)
  }
  stamp.set()
}

/** Removes from dist what has no source any more. */
function prune() {
  const dist = join(root, 'dist')
  for (const entry of readdirSync(dist, { withFileTypes: true, recursive: true })) {
    if (!entry.isFile()) continue
    const path = join(entry.parentPath, entry.name)
    const name = relative(dist, path).replace(/(\.d)?\.(m?)js(\.map)?$|\.d\.(m?)ts(\.map)?$/, '.$2$4ts')
    const folder = /^(bench|examples)[/\\]/.test(name) ? root : join(root, 'lib')
    if (!existsSync(join(folder, name))) rmSync(path)
  }
}

/** lib/ becomes dist/; bench/ and examples/, which use the library as its users do, become folders of dist/. */
async function compile() {
  const sources = ['lib', 'bench', 'examples', 'tsconfig.json', 'tsconfig.tools.json']
  const stamp = new Stamp(join(stamps, 'dist'), join(root, 'dist/index.js'), hashOf(root, sources, {}))
  if (stamp.fresh) return
  stamp.clear()
  const tsc = inModules('typescript/bin/tsc')
  await run('Compiling', process.execPath, [tsc, '-p', 'tsconfig.json'], { cwd: root })
  await run('Compiling the tools', process.execPath, [tsc, '-p', 'tsconfig.tools.json'], { cwd: root })
  prune()
  stamp.set()
}

let release = () => {}
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) {
  process.on(signal, () => {
    stopChildren('SIGTERM')
    release()
    process.exit(signal === 'SIGINT' ? 130 : 143)
  })
}
try {
  checkNode()
  release = await acquire(join(stamps, 'lock'))
  if (installed && !(options.has('--native') && options.has('--gyp'))) {
    throw new SetupError(howToBuild)
  }
  if (!installed) await installModules()
  await buildAddon()
  if (!options.has('--native')) await compile()
} catch (error) {
  if (!(error instanceof SetupError)) throw error
  process.stderr.write(`${error.message}\n`)
  process.exitCode = 1
} finally {
  release()
}
