// A worker that works until it is terminated; or, told how many turns, checks its results and ends.
const { parentPort, workerData } = require('node:worker_threads')
const { Tensor, ops } = require('../../../dist/index.js')

async function turn(i) {
  const data = new Float32Array(100_000).fill(i)
  const x = Tensor.from(data, { copy: false, device: workerData.device })
  let y = ops.add(x, 1)
  for (let j = 0; j < 20; j++) {
    const next = ops.add(y, x)
    y.dispose()
    y = next
  }
  const result = await y.data()
  x.dispose()
  y.dispose()
  if (result[0] !== 21 * i + 1 || result[99_999] !== 21 * i + 1) throw new Error(`turn ${i}: ${result[0]}`)
}

void (async () => {
  for (let i = 0; i < (workerData.turns ?? Infinity); i++) {
    const work = turn(i)
    if (i === 0) parentPort.postMessage('working')
    await work
  }
  parentPort.postMessage('done')
})()
