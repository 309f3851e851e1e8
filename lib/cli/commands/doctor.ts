/** halfbyte doctor: what the library found on this machine, and what is missing. Works without the addon too. */
import { readFileSync } from 'node:fs'
import { availableParallelism, cpus, freemem, totalmem } from 'node:os'
import type { SystemInfo } from '../../tensor/system.js'
import { usageError, type Command } from '../command.js'
import { describeError, print, printJson } from '../output.js'
import { commonOptions } from '../options.js'
import { formatBytes } from '../table.js'

/** Extensions that kernels are written for, as Linux names them. */
const FEATURES = [
  'avx2',
  'fma',
  'f16c',
  'bmi2',
  'avx_vnni',
  'avx512f',
  'avx512bw',
  'avx512dq',
  'avx512vl',
  'avx512_vnni',
]

interface Findings {
  node: string
  platform: string
  cpu: { model: string; cores: number; features: string[] }
  memory: { total: number; free: number }
  library: SystemInfo | undefined
  /** cuBLASLt, where there is a CUDA device. */
  denseLibrary: { found: boolean; where: string } | undefined
  memoryByDevice: Record<string, { total: number; free: number }>
  missing: string[]
}

function cpuFeatures(): string[] {
  try {
    const flags =
      /^flags\s*:(.*)$/m.exec(readFileSync('/proc/cpuinfo', 'utf8'))?.[1]?.trim().split(/\s+/) ?? []
    return FEATURES.filter((name) => flags.includes(name))
  } catch {
    return [] // not Linux
  }
}

async function examine(device: string | undefined): Promise<Findings> {
  const findings: Findings = {
    node: process.version,
    platform: `${process.platform}-${process.arch}`,
    cpu: { model: cpus()[0]?.model ?? 'unknown', cores: availableParallelism(), features: cpuFeatures() },
    memory: { total: totalmem(), free: freemem() },
    library: undefined,
    denseLibrary: undefined,
    memoryByDevice: {},
    missing: [],
  }
  try {
    const { denseLibrary, systemInfo } = await import('../../tensor/system.js')
    const { device: open } = await import('../../tensor/device.js')
    const info = systemInfo()
    findings.library = info
    if (info.cpu.complaint) findings.missing.push(info.cpu.complaint)
    if (info.devices.every((name) => name.startsWith('cpu'))) {
      findings.missing.push(`no CUDA device: ${info.cuda.reason}`)
    } else {
      findings.denseLibrary = denseLibrary()
      if (!findings.denseLibrary.found) {
        findings.missing.push(
          `cuBLASLt: dense products run on own kernels, which are slower; tried ${findings.denseLibrary.where}`,
        )
      }
    }
    for (const name of device === undefined ? info.devices : [device]) {
      const { total, free } = open(name).memoryUsage()
      findings.memoryByDevice[name] = { total, free }
    }
  } catch (error) {
    findings.missing.push(describeError(error).replace(/^halfbyte: /, ''))
  }
  return findings
}

function report({ library, ...found }: Findings): string {
  const { isa, vnni, threads } = library?.cpu ?? { isa: '', vnni: false, threads: 0 }
  const cuda = library?.cuda
  const rows: [string, string | undefined][] = [
    ['node', `${found.node} on ${found.platform}`],
    ['binding', library ? `${library.binding} (version ${library.version})` : 'does not load'],
    ['cpu', `${found.cpu.model}, ${found.cpu.cores} cores`],
    ['features', found.cpu.features.join(' ') || 'unknown'],
    ['kernels', library && `${isa}${vnni ? ' with VNNI' : ''}, ${threads} threads`],
    ['memory', `${formatBytes(found.memory.total)}, ${formatBytes(found.memory.free)} free`],
    [
      'cuda',
      cuda &&
        (cuda.compiled
          ? `${cuda.archs}; driver ${cuda.driver || 'none'}, runtime ${cuda.runtime}`
          : 'not in this build'),
    ],
    [
      'dense products',
      found.denseLibrary && (found.denseLibrary.found ? found.denseLibrary.where : 'own kernels'),
    ],
    ...Object.entries(found.memoryByDevice).map(([name, memory]): [string, string] => [
      `device ${name}`,
      `${formatBytes(memory.total)}, ${formatBytes(memory.free)} free`,
    ]),
    ...(found.missing.length > 0 ? found.missing : ['nothing']).map((what, i): [string, string] => [
      i === 0 ? 'missing' : '',
      what,
    ]),
  ]
  return rows
    .filter(([, value]) => value !== undefined)
    .map(([name, value]) => `${name.padEnd(16)}${value}`)
    .join('\n')
}

export const doctor: Command = {
  name: 'doctor',
  summary:
    'Says what the library found on this machine, and what is missing. Fails when the addon does not load.',
  arguments: '',
  count: [0, 0],
  options: [['Options', commonOptions]],
  async run({ flags }) {
    const name = flags.text('device')
    if (name !== undefined && !/^(cpu|cuda)(:\d+)?$/.test(name)) {
      throw usageError(`--device is ${JSON.stringify(name)}; the names are cpu, cpu:N, cuda and cuda:N`)
    }
    const findings = await examine(name)
    if (flags.switch('json')) printJson(findings)
    else print(report(findings))
    if (!findings.library || (name !== undefined && !(name in findings.memoryByDevice))) process.exitCode = 1
  },
}
