// The process ends by itself: pending reads keep it alive, nothing else does.
const { Tensor, device } = require('../../../dist/index.js')
const { queueWork } = require('./work.js')

void queueWork('cpu', 20)
  .data()
  .then((data) => console.log('read', data.length))
Tensor.zeros([10], 'float32', device('cpu:1'))
process.on('exit', () => console.log('end'))
