/** halfbyte eval: perplexity of a model on a text. */
import { readFileSync } from 'node:fs'
import { evaluationIds, perplexity } from '../../models/index.js'
import { getTrueFootprint } from '../../patch/footprint.js'
import { usageError, type Command } from '../command.js'
import { describeWeights, loadModel } from '../load.js'
import { modelOptions } from '../model_options.js'
import { commonOptions } from '../options.js'
import { print, printJson } from '../output.js'
import { Progress } from '../progress.js'
import { formatBytes, formatSeconds } from '../table.js'

export const evaluate: Command = {
  name: 'eval',
  summary:
    'Perplexity on a text: exp of the mean of -log p. The text, behind one begin-of-text token, is cut into whole\n' +
    'windows of N tokens. In each of them the model predicts N tokens, those from its second to the first of the next\n' +
    'window, and sees nothing from before the window. What does not fill a window at the end is left out, unless there\n' +
    'is no whole one.',
  arguments: 'DIR --text FILE',
  count: [1, 1],
  options: [
    [
      'Text',
      {
        text: { value: 'FILE', help: 'the text, UTF-8' },
        window: { value: 'N', help: 'tokens that the model sees at once (default 512)' },
        limit: { value: 'N', help: 'only the first N tokens of the text' },
      },
    ],
    ['Model', modelOptions],
    ['Options', commonOptions],
  ],
  async run(invocation) {
    const { positionals, flags, signal } = invocation
    const file = flags.text('text')
    if (file === undefined) throw usageError('--text FILE is missing. See halfbyte eval --help')
    const window = flags.number('window', { min: 2, whole: true }) ?? 512
    const limit = flags.number('limit', { min: 2, whole: true })
    const text = readFileSync(file, 'utf8')
    const { model } = await loadModel(positionals[0]!, invocation)
    const ids = evaluationIds(model, text).slice(0, limit)
    const began = performance.now()
    using progress = new Progress('Evaluating')
    const result = await perplexity(model, ids, {
      window,
      signal,
      onProgress: (done, total) => progress.update(done, total),
    })
    progress.end()
    const seconds = (performance.now() - began) / 1e3
    const weights = describeWeights(model)
    const footprint = getTrueFootprint(model)
    if (flags.switch('json')) {
      printJson({ model: positionals[0], weights, footprint, window, ...result, seconds })
    } else {
      print(
        `perplexity ${result.perplexity.toFixed(4)}  (${weights}, ${formatBytes(footprint)}; ${result.tokens} tokens ` +
          `in windows of ${window}, ${formatSeconds(seconds)}, ${(result.tokens / seconds).toFixed(0)} tokens/s)`,
      )
    }
    model.dispose()
  },
}
