// Run in a process of its own by test/golden/isa.test.ts, on the built library: prints the instruction set that is used
// and a digest of the codes, statistics and values of all formats for one fixed set of inputs.
const { Buffer } = require('node:buffer')
const { createHash } = require('node:crypto')
const { join } = require('node:path')
const dist = join(__dirname, '..', '..', 'dist')
const { functional, ops, Tensor, device } = require(dist)
const { native } = require(join(dist, 'native.js'))

const cpu = device('cpu')
let state = 1
const next = () => {
  state = (Math.imul(state, 1664525) + 1013904223) >>> 0
  return state / 2 ** 32
}

async function main() {
  const info = native.cpuInfo()
  const digests = {}
  const add = async (name, ...tensors) => {
    const hash = createHash('sha256')
    for (const tensor of tensors) {
      const data = await tensor.data()
      hash.update(Buffer.from(data.buffer, data.byteOffset, data.byteLength))
    }
    digests[name] = hash.digest('hex')
  }
  for (const n of [1, 33, 4099, 40000]) {
    const values = new Float32Array(n)
    for (let i = 0; i < n; i++) values[i] = (next() + next() + next() - 1.5) * 2 ** ((i >> 9) % 20)
    for (const dtype of ['float32', 'float16', 'bfloat16']) {
      const x = Tensor.from(values, { device: cpu }).to(dtype)
      for (const quantType of ['nf4', 'fp4']) {
        for (const blocksize of [32, 64, 1024]) {
          const { codes, state: s } = functional.quantize4bit(x, {
            quantType,
            blocksize,
            compressStatistics: true,
          })
          const y = functional.dequantize4bit(codes, s)
          await add(`${n} ${dtype} ${quantType} ${blocksize}`, codes, s.absmax, s.offset, s.state2.absmax, y)
        }
      }
      for (const blocksize of [1, 100, 256]) {
        const { codes, state: s } = functional.quantizeBlockwise(x, { blocksize })
        await add(
          `${n} ${dtype} dynamic ${blocksize}`,
          codes,
          s.absmax,
          functional.dequantizeBlockwise(codes, s),
        )
      }
      for (const act of ['silu', 'gelu', 'gelu_tanh', 'tanh', 'exp']) {
        await add(`${n} ${dtype} ${act}`, ops.activation(x, act))
      }
    }
  }
  for (const [m, n, k] of [
    [1, 5, 1],
    [1, 33, 130],
    [3, 17, 1025],
    [7, 40, 64],
    [70, 18, 257],
  ]) {
    const signed = (count) => Int8Array.from({ length: count }, () => Math.floor(next() * 256) - 128)
    const a = Tensor.from(signed(m * k), { shape: [m, k], device: cpu })
    const b = Tensor.from(signed(n * k), { shape: [n, k], device: cpu })
    const sums = ops.int8Matmul(a, b)
    await add(`int8 product ${m} ${n} ${k}`, sums)
    const values = Float32Array.from({ length: m * k }, () => (next() - 0.5) * (next() < 0.02 ? 40 : 4))
    for (const dtype of ['float32', 'float16', 'bfloat16']) {
      const x = Tensor.from(values, { shape: [m, k], device: cpu }).to(dtype)
      for (const threshold of [0, 6]) {
        const { codes, rowAbsmax, outlierMask } = ops.int8QuantizeRows(x, threshold)
        const y = ops.int8DequantizeRows(codes, rowAbsmax, dtype)
        const rows = outlierMask ? [codes, rowAbsmax, outlierMask, y] : [codes, rowAbsmax, y]
        await add(`int8 rows ${m} ${k} ${dtype} ${threshold}`, ...rows)
      }
    }
  }
  process.stdout.write(
    JSON.stringify({ isa: info.isa, vnni: info.vnni, complaint: info.isaComplaint, digests }),
  )
}
main()
