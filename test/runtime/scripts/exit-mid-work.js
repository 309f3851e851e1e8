// process.exit() while ops, reads, copies and file reads are queued and running.
const { Tensor, device } = require('../../../dist/index.js')
const { native } = require('../../../dist/native.js')
const { queueWork } = require('./work.js')

const delay = Number(process.argv[2])
for (const name of ['cpu', 'cpu:1']) {
  const x = queueWork(name, 200)
  void x.data()
  void x.to(name === 'cpu' ? 'cpu:1' : 'cpu').data()
}
const file = native.openFile(__filename)
const large = native.openFile(process.execPath)
for (const name of native.devices()) {
  for (let i = 0; i < 50; i++) file.tensor(device(name).native, 4, [file.size], 0)
  for (let i = 0; i < 20; i++) large.tensor(device(name).native, 4, [large.size], 0)
}
const borrowed = new Float32Array(400_000)
void Tensor.from(borrowed, { copy: false }).to('bfloat16').data()
if (delay < 0) process.exit(0)
setTimeout(() => process.exit(0), delay)
