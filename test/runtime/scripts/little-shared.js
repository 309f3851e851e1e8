// Attention on the device of the first argument against the CPU, with heads for which CUDA has no tensor-core kernel. A
// line for each dtype and head size: ok, the error's code, or how far it is off.
const { Tensor, ops } = require('../../../dist/index.js')

const [heads, kvHeads, blockLen, blocks] = [4, 2, 16, 20]
const noise = (n, seed) => Float32Array.from({ length: n }, (_, i) => Math.sin(seed + 0.37 * i * (i % 101)))

async function attention(device, dtype, dim) {
  const tensor = (shape, seed) =>
    Tensor.from(
      noise(
        shape.reduce((a, b) => a * b),
        seed,
      ),
      { shape, device },
    ).to(dtype)
  const indices = (...values) => Tensor.from(Int32Array.from(values), { device })
  const [keys, values] = [1, 2].map((seed) => tensor([blocks, blockLen, kvHeads, dim], seed))
  const q = tensor([21, heads, dim], 3)
  const blockTable = indices(...Array(blocks).keys()).reshape(2, blocks / 2)
  const batch = { queryStarts: indices(0, 20, 21), lengths: indices(140, 155), blockTable }
  return ops.pagedAttention(q, keys, values, batch).floats()
}

async function verdict(name, dtype, dim, bound) {
  try {
    const [y, expected] = [await attention(name, dtype, dim), await attention('cpu', dtype, dim)]
    const norm = (x) => Math.hypot(...x)
    const error = norm(y.map((value, i) => value - expected[i])) / norm(expected)
    return error < bound ? 'ok' : String(error)
  } catch (error) {
    return error.code ?? String(error)
  }
}

void (async () => {
  const name = process.argv[2]
  for (const dim of [64, 120, 128, 256, 512])
    console.log('float32', dim, await verdict(name, 'float32', dim, 1e-5))
  for (const dim of [60, 100, 200, 300])
    console.log('float16', dim, await verdict(name, 'float16', dim, 2e-3))
})()
