/** A model of one's own in 4 bits. After `npm run build`: node dist/examples/custom-model.js */
import {
  Embedding,
  getTrueFootprint,
  Linear,
  Module,
  ModuleList,
  ops,
  RMSNorm,
  SelfAttention,
} from 'halfbyte'
import { replaceWithQuantizedLinear, Tensor, tidy } from 'halfbyte'

class Block extends Module {
  norm = new RMSNorm(256)
  attention = new SelfAttention(256, 8, { ropeTheta: 10000 })
  up = new Linear(256, 1024)
  down = new Linear(1024, 256)

  forward(x: Tensor): Tensor {
    const mid = ops.add(x, this.attention.forward(this.norm.forward(x)))
    return this.down.forward(ops.activation(this.up.forward(mid), 'gelu'), mid) // adds mid in the same pass
  }
}

class LanguageModel extends Module {
  embed = new Embedding(1000, 256)
  blocks = new ModuleList([new Block(), new Block(), new Block()])
  head = new Linear(256, 1000, { bias: false })

  forward(ids: Tensor): Tensor {
    return tidy(() => {
      const x = [...this.blocks].reduce((at, block) => block.forward(at), this.embed.forward(ids))
      return this.head.forward(x)
    })
  }
}

export async function main(): Promise<void> {
  const model = new LanguageModel()
  console.log(`float32: ${getTrueFootprint(model)} bytes`)
  const report = replaceWithQuantizedLinear(model, { loadIn4bit: true, bnb4bitQuantType: 'nf4' })
  for (const { path, from, to } of report.replaced) console.log(`${path}: ${from} -> ${to}`)
  for (const { path, reason } of report.kept) console.log(`${path} is kept: ${reason}`)
  const logits = model.forward(Tensor.from(Int32Array.of(5, 17, 256, 999)))
  console.log(`nf4: ${getTrueFootprint(model)} bytes, logits ${String(logits)}`)
  console.log(`next token: ${(await ops.argmax(logits).data())[3]}`)
}
if (require.main === module) void main()
