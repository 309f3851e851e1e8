// --expose-gc: what nobody disposed is freed by the garbage collector, borrowed arrays live exactly as long as needed.
process.env.HALFBYTE_DEVICE = 'cpu' // borrowing is the CPU's
const { setTimeout: sleep } = require('node:timers/promises')
const { Tensor, device, ops } = require('../../../dist/index.js')

async function collect() {
  for (let i = 0; i < 5; i++) {
    globalThis.gc()
    await sleep(1)
  }
  await device('cpu').synchronize()
}

function borrowed() {
  const array = new Float32Array(1000).fill(3)
  return { tensor: Tensor.from(array, { copy: false }), buffer: new WeakRef(array.buffer) }
}

void (async () => {
  const { tensor, buffer } = borrowed()
  await collect()
  console.log('in use:', buffer.deref() !== undefined)
  const sum = ops.add(tensor, tensor)
  tensor.dispose()
  console.log('sum:', (await sum.data())[999])
  sum.dispose()
  await collect()
  console.log('kept after use:', buffer.deref() !== undefined)

  for (let i = 0; i < 100; i++) ops.add(Tensor.full([1000], i), 1).slice(0, 0, 10)
  device('cpu').capture(() => ops.add(Tensor.full([1000], 1), 1))
  await collect()
  console.log('left:', device('cpu').memoryUsage().allocated)
})()
