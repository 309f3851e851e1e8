// Saves forms of a small model over each other, for ever, until it is killed: by its parent, or by itself before the
// `step`th change of a name in the folder. Form k has all weights k, and `form: k` in config.json.
const fs = require('node:fs')
const { AutoModelForCausalLM, Tensor } = require('../../../dist/index.js')

const [source, folder, first, step = 'never'] = process.argv.slice(2)

let changes = 0
function countChanges(of, name) {
  const own = of[name]
  of[name] = (...args) => {
    const [path] = args
    if (String(path).startsWith(folder) && String(++changes) === step) process.kill(process.pid, 'SIGKILL')
    return own(...args)
  }
}

void (async () => {
  const model = await AutoModelForCausalLM.fromPretrained(source, { device: 'cpu' })
  for (let form = Number(first); ; form++) {
    for (const parameter of model.parameters()) {
      const value = Tensor.full([...parameter.shape], form, 'float32', 'cpu')
      parameter.load(value)
    }
    model.config.raw.form = form
    const texts = model.config.texts.bind(model.config)
    model.config.texts = () => ({ ...texts(), form })
    // one file, or more and fewer shards
    const maxShardSize = [1 << 30, 40_000, 90_000][form % 3]
    await model.savePretrained(folder, { maxShardSize })
    if (form === Number(first)) {
      console.log('saved')
      for (const name of ['renameSync', 'rmSync']) countChanges(fs, name)
      for (const name of ['rename', 'rm']) countChanges(fs.promises, name)
    }
  }
})()
