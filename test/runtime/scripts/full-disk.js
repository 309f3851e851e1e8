// Saves a model, then a larger form of it, which is to fail; says how, and whether the first is still as it was.
const { readFileSync, readdirSync } = require('node:fs')
const { join } = require('node:path')
const { AutoModelForCausalLM } = require('../../../dist/index.js')

const source = join(__dirname, '../../../models/tinypy-2m')
const folder = process.argv[2]
const content = () => readdirSync(folder).map((name) => [name, readFileSync(join(folder, name), 'latin1')])

async function save(dtype) {
  const model = await AutoModelForCausalLM.fromPretrained(source, { dtype, device: 'cpu' })
  try {
    await model.savePretrained(folder, { maxShardSize: '1MB' })
  } finally {
    model.dispose()
  }
}

void (async () => {
  await save('bfloat16')
  const before = content()
  const error = await save('float32').catch((reason) => reason)
  console.log(error?.name, error?.code)
  console.log(error?.message.replace(`${folder}/`, ''))
  console.log(before.length, 'files, as before:', JSON.stringify(content()) === JSON.stringify(before))
})()
