/** Experts that compute their own tokens alone, against experts that compute all of them. */
import {
  BitsAndBytesConfig,
  devices,
  Linear4bit,
  Linear8bit,
  noGrad,
  ops,
  replaceWithQuantizedLinear,
  SparseMlp,
  Tensor,
  tidy,
  type BitsAndBytesConfigOptions,
  type DType,
} from '../../lib/index.js'
import { thrown } from '../support/errors.js'
import { noise, relativeError } from '../support/reference.js'

type Spec = ConstructorParameters<typeof SparseMlp>[0]
type ExpertSpec = ConstructorParameters<typeof SparseMlp>[1]

const [hiddenSize, intermediateSize] = [256, 256]
const spec = {
  names: {},
  hiddenSize,
  intermediateSize,
  mlpBias: false,
  activation: 'silu',
  mlp: 'gated',
} as unknown as Spec
const softmax: ExpertSpec = {
  count: 12,
  perToken: 3,
  intermediateSize,
  normalize: true,
  routerBias: false,
  groupRouting: null,
  sharedSize: 0,
  fused: null,
  layers: [true],
}

const MIXTURES: [string, Spec, ExpertSpec][] = [
  ['a softmax over the chosen', spec, softmax],
  ['a softmax over all, one expert a token', spec, { ...softmax, normalize: false, perToken: 1 }],
  [
    'groups and a shared expert',
    spec,
    { ...softmax, sharedSize: 64, groupRouting: { groups: 4, chosenGroups: 2, scale: 2.5 } },
  ],
  [
    'experts in one tensor',
    { ...spec, mlpBias: true },
    { ...softmax, routerBias: true, fused: { limit: 7 } },
  ],
]
const KINDS: [string, BitsAndBytesConfigOptions | undefined][] = [
  ['plain', undefined],
  ['nf4', { loadIn4bit: true, bnb4bitQuantType: 'nf4', bnb4bitUseDoubleQuant: true }],
  ['int8', { loadIn8bit: true, llmInt8Threshold: 0.98 }],
]

/** Makes an expert's layer one that can only be called. */
function callOnly(mlp: SparseMlp): () => void {
  const layer = mlp.modules().find((module) => module instanceof Linear4bit || module instanceof Linear8bit)
  const module = layer ?? [...mlp.experts.children(), mlp.experts][0]!
  // eslint-disable-next-line @typescript-eslint/unbound-method -- called with the module
  const forward = module.forward as (...inputs: unknown[]) => unknown
  Object.defineProperty(module, 'forward', {
    value: (...inputs: unknown[]) => forward.apply(module, inputs),
    configurable: true,
  })
  return () => Reflect.deleteProperty(module, 'forward')
}

describe.each(devices())('mixtures on %s', (device) => {
  describe.each(MIXTURES)('by %s', (_, decoder, experts) => {
    it.each(KINDS)('%s', async (kind, config) => {
      using mlp = new SparseMlp(decoder, experts)
      mlp.to(device)
      if (config) replaceWithQuantizedLinear(mlp, new BitsAndBytesConfig(config))
      for (const dtype of ['float32', 'bfloat16'] satisfies DType[]) {
        if (!config) mlp.to(dtype)
        else mlp.gate.to(dtype)
        for (const module of mlp.modules()) if (module instanceof Linear4bit) module.computeDtype = dtype
        for (const tokens of [1, 2, 20, 90]) {
          using x = tidy(() =>
            Tensor.from(noise(tokens * hiddenSize, tokens), { shape: [tokens, hiddenSize], device }).to(
              dtype,
            ),
          )
          const results = async () => {
            using y = noGrad(() => mlp.forward(x, x))
            return await y.floats()
          }
          const chosen = await results()
          const restore = callOnly(mlp)
          const all = await results()
          restore()
          expect(relativeError(chosen, all)).toBeLessThan(
            dtype === 'float32' ? 1e-5 : kind === 'int8' ? 2e-2 : 1e-2,
          )
        }
      }
    })
  })

  it('use no more than the chosen experts', async () => {
    using mlp = new SparseMlp(spec, softmax)
    mlp.to(device)
    using x = Tensor.from(noise(hiddenSize), { shape: [1, hiddenSize], device })
    const result = async () => {
      using y = noGrad(() => mlp.forward(x))
      return await y.floats()
    }
    const before = await result()
    using logits = noGrad(() => mlp.gate.forward(x))
    const { ids, weights } = noGrad(() => ops.routeTokens(logits, { perToken: 3, softmax: true }))
    const chosen = [...(await ids.data())].map(Number)
    for (const tensor of [ids, weights]) tensor.dispose()
    for (const [e, expert] of [...mlp.experts.children()].entries()) {
      if (chosen.includes(e)) continue
      for (const [, { value }] of expert.namedParameters()) ops.fillInto(value, NaN)
    }
    const takes = noGrad(() => mlp.experts.chosen(x, 3)) !== undefined
    expect(takes || device.type !== 'cpu').toBe(true)
    if (takes) expect(await result()).toEqual(before)
  })

  it('have no gradient, and say so', () => {
    using mlp = new SparseMlp(spec, softmax)
    mlp.to(device)
    using x = Tensor.from(noise(4 * hiddenSize), { shape: [4, hiddenSize], device })
    x.requiresGrad = true
    expect(thrown(() => mlp.forward(x)).code).toBe('ERR_HALFBYTE_UNSUPPORTED')
  })
})
