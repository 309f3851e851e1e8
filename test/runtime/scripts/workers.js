// Several workers and the main thread on one device, all with right results.
const { join } = require('node:path')
const { Worker } = require('node:worker_threads')
const { Tensor, ops } = require('../../../dist/index.js')

const start = (workerData) =>
  new Promise((resolve, reject) => {
    const worker = new Worker(join(__dirname, 'worker.js'), { workerData })
    let last
    worker.on('message', (message) => (last = message))
    worker.on('error', reject)
    worker.on('exit', (code) => resolve(`${last} ${code}`))
  })

void (async () => {
  const workers = [0, 1, 2, 3].map((i) => start({ turns: 15, device: i % 2 ? 'cpu:1' : 'cpu' }))
  for (let i = 0; i < 50; i++) {
    const x = Tensor.full([1000], i)
    const y = ops.add(x, x)
    if ((await y.data())[999] !== 2 * i) throw new Error('wrong result in the main thread')
    x.dispose()
    y.dispose()
  }
  console.log((await Promise.all(workers)).join(', '))
})()
