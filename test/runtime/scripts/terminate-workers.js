// Workers terminated in the middle of their work, again and again; afterwards the device is as good as before.
const { join } = require('node:path')
const { setTimeout: sleep } = require('node:timers/promises')
const { Worker } = require('node:worker_threads')
const { Tensor, device, ops } = require('../../../dist/index.js')

const started = (workerData) =>
  new Promise((resolve, reject) => {
    const worker = new Worker(join(__dirname, 'worker.js'), { workerData })
    worker.once('message', () => resolve(worker))
    worker.once('error', reject)
  })

void (async () => {
  for (let round = 0; round < 12; round++) {
    const workers = await Promise.all([started({ device: 'cpu' }), started({ device: 'cpu:1' })])
    await sleep(round)
    await Promise.all(workers.map((worker) => worker.terminate()))
  }
  const x = Tensor.full([4], 2)
  const y = ops.add(x, x)
  console.log(...(await y.data()))
  x.dispose()
  y.dispose()
  for (const name of ['cpu', 'cpu:1']) {
    await device(name).synchronize()
    console.log(name, device(name).memoryUsage().allocated)
  }
})()
