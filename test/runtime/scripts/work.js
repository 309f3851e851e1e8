// Shared by the scripts: work that keeps a device busy for longer than anything else here takes.
const { Tensor, ops } = require('../../../dist/index.js')

/** Queues `count` ops of a millisecond or so, and returns the last result. */
exports.queueWork = (device, count) => {
  let x = Tensor.full([400_000], 0.5, 'float32', device)
  for (let i = 0; i < count; i++) {
    const next = ops.activation(x, 'gelu')
    x.dispose()
    x = next
  }
  return x
}
