// A short proof that a build of the addon works: node smoke.cjs MODULE, where MODULE is what require() finds the
// library by. HALFBYTE_BINDING names the binary to prove.
const assert = require('node:assert')
const { resolve } = require('node:path')

const name = process.argv[2]
const { Tensor, ops, HalfbyteError } = require(name.startsWith('.') ? resolve(name) : name)

async function main() {
  // The entries of the NF4 codebook come back as they are when a block's absmax is 1.
  const values = [-1, 0, 1, -0.5250730514526367, 0.7229568362236023, 0.07958029955625534, 0, 1]
  const weight = Tensor.from(
    Float32Array.from({ length: 64 * 32 }, (_, i) => values[i % 8]),
    { shape: [32, 64] },
  )
  const { codes, absmax } = ops.quantizeBlocks4(weight, 'nf4', 64)
  const packed = { codes, absmax, quantType: 'nf4', blocksize: 64, n: 32, k: 64 }
  assert.deepEqual(await ops.dequantizeBlocks4(packed, 'float32').data(), await weight.data())

  const x = Tensor.from(
    Float32Array.from({ length: 3 * 64 }, (_, i) => Math.sin(i)),
    { shape: [3, 64] },
  )
  const quantised = await ops.linear4bit(x, packed).data()
  const dense = await ops.linear(x, weight).data()
  const rows = await x.data()
  const w = await weight.data()
  for (let m = 0; m < 3; m++) {
    for (let n = 0; n < 32; n++) {
      let sum = 0
      for (let k = 0; k < 64; k++) sum += rows[m * 64 + k] * w[n * 64 + k]
      assert.ok(
        Math.abs(dense[m * 32 + n] - sum) < 1e-4,
        `linear [${m}, ${n}]: ${dense[m * 32 + n]}, not ${sum}`,
      )
      assert.ok(Math.abs(quantised[m * 32 + n] - sum) < 1e-4, `linear4bit [${m}, ${n}]`)
    }
  }
  assert.throws(() => ops.linear(x, x.reshape([64, 3])), HalfbyteError)
  console.log(`smoke: ${process.env.HALFBYTE_BINDING ?? name} works`)
}

main().catch((error) => {
  console.error(error)
  process.exit(1)
})
