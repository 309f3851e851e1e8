// Prints the number of threads of the pool, and a sum that they made.
const { Tensor, ops, systemInfo } = require('../../../dist/index.js')

void (async () => {
  const x = Tensor.full([1 << 20], 1, 'float32', 'cpu')
  const y = ops.add(x, x)
  const data = await y.data()
  console.log(
    systemInfo().cpu.threads,
    data.reduce((a, b) => a + b, 0),
  )
})()
