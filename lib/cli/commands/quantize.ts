/** halfbyte quantize: writes a checkpoint with quantised weights, which this library and Python's read. */
import { existsSync, readdirSync, statSync } from 'node:fs'
import { join } from 'node:path'
import { isSameFolder, parseSize } from '../../checkpoint/write.js'
import { usageError, type Command } from '../command.js'
import { describeWeights, loadModel } from '../load.js'
import { quantizationFields, modelOptions } from '../model_options.js'
import { commonOptions } from '../options.js'
import { print, printJson } from '../output.js'
import { Progress } from '../progress.js'
import { formatBytes } from '../table.js'

function bytesOfWeights(folder: string): number {
  return readdirSync(folder)
    .filter((name) => name.endsWith('.safetensors'))
    .reduce((sum, name) => sum + statSync(join(folder, name)).size, 0)
}

export const quantize: Command = {
  name: 'quantize',
  summary: 'Writes a checkpoint with quantised weights, in the format of transformers and bitsandbytes.',
  arguments: 'DIR --out DIR --load-in-4bit|--load-in-8bit',
  count: [1, 1],
  options: [
    [
      'Output',
      {
        out: { short: 'o', value: 'DIR', help: 'folder to write to; made when it is not there' },
        'max-shard-size': { value: 'SIZE', help: 'size of the largest file, such as 2GB (default 50GB)' },
      },
    ],
    ['Model', modelOptions],
    ['Options', commonOptions],
  ],
  async run(invocation) {
    const { positionals, flags, signal } = invocation
    const source = positionals[0]!
    const out = flags.text('out')
    if (out === undefined) throw usageError('--out DIR is missing. See halfbyte quantize --help')
    if (!quantizationFields(flags)) throw usageError('say how to quantise: --load-in-4bit or --load-in-8bit')
    if (isSameFolder(out, source)) throw usageError('--out is the folder of the model itself; choose another')
    if (existsSync(out) && !statSync(out).isDirectory()) throw usageError(`--out ${out} is not a folder`)
    const shardSize = flags.text('max-shard-size')
    const maxShardSize = shardSize === undefined ? undefined : parseSize(shardSize)
    const { model } = await loadModel(source, invocation)
    using progress = new Progress('Writing')
    await model.savePretrained(out, {
      signal,
      onProgress: ({ writtenBytes, totalBytes }) => progress.update(writtenBytes, totalBytes),
      ...(maxShardSize === undefined ? {} : { maxShardSize }),
    })
    progress.end()
    const replaced = model.replacement?.replaced.length ?? 0
    const [before, after] = [bytesOfWeights(source), bytesOfWeights(out)]
    const weights = describeWeights(model)
    if (flags.switch('json'))
      printJson({ source, out, weights, replaced, bytesBefore: before, bytesAfter: after })
    else
      print(`${out}: ${replaced} layers in ${weights}, ${formatBytes(before)} became ${formatBytes(after)}`)
    model.dispose()
  },
}
