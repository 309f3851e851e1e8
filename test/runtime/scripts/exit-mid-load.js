// process.exit() while models are loaded on every device, after so many milliseconds; with a folder for offloading.
const { native } = require('../../../dist/native.js')
const { loadForever } = require('./load-forever.js')

const [delay, folder] = process.argv.slice(2)
for (const name of native.devices()) for (let i = 0; i < 2; i++) void loadForever(name, folder)
setTimeout(() => process.exit(0), Number(delay))
