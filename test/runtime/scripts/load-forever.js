// Loads a model over and over, in memory and with parts on the disk, and runs it, for whoever ends meanwhile.
const { join } = require('node:path')
const { AutoModelForCausalLM } = require('../../../dist/index.js')

const folder = join(__dirname, '../../../models/tinypy-2m')

/** `begun` is called when the first load is under way. */
exports.loadForever = async (device, offloadFolder, begun = () => {}) => {
  const deviceMap = { '': device, 'model.layers': 'disk' }
  const quantizationConfig = { loadIn4bit: true, llmInt8EnableFp32CpuOffload: true }
  const ways = [
    { device },
    { deviceMap },
    { device, quantizationConfig },
    { deviceMap, quantizationConfig, offloadFolder },
  ]
  for (let i = 0; ; i++) {
    const loading = AutoModelForCausalLM.fromPretrained(folder, ways[i % ways.length])
    if (i === 0) begun()
    const model = await loading
    const logits = model.forward([1, 2, 3])
    if (i % 2) await logits.data()
    logits.dispose()
    model.dispose()
  }
}
