// A worker that loads models until it is terminated.
const { parentPort, workerData } = require('node:worker_threads')
const { loadForever } = require('./load-forever.js')

void loadForever(workerData.device, workerData.folder, () => parentPort.postMessage('loading'))
