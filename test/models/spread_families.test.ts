/** Every family on two devices, its parts spread in different ways, and on the disk: the results of one device. */
import { AutoModelForCausalLM } from '../../lib'
import { results } from '../support/causal_lm'
import { temporaryFolder } from '../support/files'
import { goldenPath } from '../support/golden'
import { error, goldenModels, readGoldenModel } from '../support/golden_model'

const offloadFolder = temporaryFolder()

describe.each(goldenModels().filter((name) => !name.includes('-bnb-')))('%s', (name) => {
  const { folder, sequences } = readGoldenModel(goldenPath(`models/${name}`)!)
  const ids = sequences[0]!

  /** Bit for bit; but experts that are apart compute all tokens, not their own alone, and sums have another order. */
  const expectSame = (got: Float32Array, wanted: Float32Array, apart: boolean) => {
    if (apart) expect(error(got, wanted).most).toBeLessThan(2e-6)
    else expect(Buffer.from(got.buffer).equals(Buffer.from(wanted.buffer))).toBe(true)
  }

  it.each([
    ['plain', undefined],
    ['in 4 bits', { loadIn4bit: true, llmInt8EnableFp32CpuOffload: true }],
  ])('%s', async (_, quantizationConfig) => {
    using whole = await AutoModelForCausalLM.fromPretrained(folder, { device: 'cpu', quantizationConfig })
    const wanted = await results(whole, ids)
    const paths = [...whole.namedModules()].map(([path]) => path)
    const isMixture = whole.spec.experts !== null
    const some = (pattern: RegExp, from = 0, place = 'cpu:1') =>
      Object.fromEntries(
        paths
          .filter((path) => pattern.test(path))
          .slice(from)
          .map((path) => [path, place]),
      )
    for (const part of [
      some(/\.(h|layers)\.\d+$/, 1),
      some(/\.(embed_positions|wpe|embed_in|rotary_emb)$/),
      some(/\.(mlp|block_sparse_moe|fc1)$/),
      some(/\.(attn|self_attn|attention|self_attention)$/, 1),
      some(/\.(experts|router|gate|q_b_proj|kv_b_proj)$|\.experts\.1$|norm$|ln_1$/),
    ]) {
      if (Object.keys(part).length === 0) continue
      const deviceMap = { '': 'cpu', ...part }
      using model = await AutoModelForCausalLM.fromPretrained(folder, { deviceMap, quantizationConfig })
      const got = await results(model, ids)
      expect([part, got.tokenIds]).toEqual([part, wanted.tokenIds])
      const apart = isMixture && Object.keys(part).some((path) => /\.experts(\.1)?$/.test(path))
      expectSame(got.logits, wanted.logits, apart)
    }
    const deviceMap = {
      '': 'cpu',
      ...some(/\.(h|layers)$/, 0, 'disk'),
      ...some(/^(lm_head|embed_out)$/, 0, 'disk'),
    }
    const options = { deviceMap, quantizationConfig, offloadFolder }
    using model = await AutoModelForCausalLM.fromPretrained(folder, options)
    const large = [...model.model.layers.namedParameters()].filter(([, { nbytes }]) => nbytes >= 64 << 10)
    for (const [path, parameter] of large) expect([path, parameter.isOffloaded]).toEqual([path, true])
    const got = await results(model, ids)
    expect(got.tokenIds).toEqual(wanted.tokenIds)
    expectSame(got.logits, wanted.logits, isMixture)
  })
})
