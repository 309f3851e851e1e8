// Workers terminated while they load models, again and again; afterwards the devices are as good as before.
const { join } = require('node:path')
const { setTimeout: sleep } = require('node:timers/promises')
const { Worker } = require('node:worker_threads')
const { AutoModelForCausalLM, device } = require('../../../dist/index.js')
const { native } = require('../../../dist/native.js')

const names = [...native.devices(), 'cpu:1']
const started = (name) =>
  new Promise((resolve, reject) => {
    const worker = new Worker(join(__dirname, 'load-worker.js'), {
      workerData: { device: name, folder: process.argv[3] },
    })
    worker.once('message', () => resolve(worker))
    worker.once('error', reject)
  })

void (async () => {
  for (let round = 0; round < Number(process.argv[2]); round++) {
    const workers = await Promise.all(names.map(started))
    await sleep((round * 7) % 50)
    await Promise.all(workers.map((worker) => worker.terminate()))
  }
  for (const name of names) {
    const model = await AutoModelForCausalLM.fromPretrained(join(__dirname, '../../../models/tinypy-2m'), {
      device: name,
    })
    const logits = model.forward([1, 2, 3])
    if (!(await logits.data()).every(Number.isFinite)) throw new Error(`${name} computes wrongly`)
    logits.dispose()
    model.dispose()
    await device(name).synchronize()
    if (device(name).memoryUsage().allocated !== 0) console.log(name, device(name).memoryUsage().allocated)
  }
  console.log('done')
})()
