import { join } from 'node:path'
import {
  AutoModelForCausalLM,
  devices,
  pipeline,
  type CausalLM,
  type GenerateOptions,
  type StreamPart,
} from '../../lib'
import { BlockAllocator } from '../../lib/generation/cache'
import { root } from '../support/files'
import { allocatedMemory, baselineMemory } from '../support/memory'

const PROMPT = 'def read_file(path):'

/** Options as JavaScript may give them. */
const wrong = (options: Record<string, unknown>) => options as GenerateOptions

describe.each(devices())('generating on %s', (device) => {
  let model: CausalLM
  let ids: number[]
  beforeAll(async () => {
    model = await AutoModelForCausalLM.fromPretrained(join(root, 'models', 'tinypy-2m'), {
      device,
      dtype: 'float32',
    })
    ids = model.tokenizer!.encode(PROMPT)
  })
  afterAll(() => model.dispose())

  async function collect(prompt: string | number[], options: GenerateOptions): Promise<StreamPart[]> {
    const parts: StreamPart[] = []
    for await (const part of model.stream(prompt, options)) parts.push(part)
    return parts
  }

  /** The token with the largest logit after each prefix, without a cache. */
  async function greedy(prompt: number[], count: number): Promise<number[]> {
    const all = [...prompt]
    for (let i = 0; i < count; i++) {
      using logits = model.forward(all)
      const last = (await logits.floats()).subarray(-model.spec.vocabSize)
      all.push(last.indexOf(Math.max(...last)))
    }
    return all.slice(prompt.length)
  }

  it('greedily gives what the whole model gives for each prefix', async () => {
    const result = await model.generate(ids, { maxNewTokens: 12 })
    expect(result.tokenIds).toEqual(await greedy(ids, 12))
    expect(result).toMatchObject({ promptIds: ids, finishReason: 'length' })
    expect(result.text).toBe(model.tokenizer!.decode(result.tokenIds))
  })

  it('says what is wrong with what is no prompt', async () => {
    for (const prompt of [undefined, null, 5, {}, [null], [true]]) {
      await expect(model.generate(prompt as string)).rejects.toMatchObject({
        code: 'ERR_HALFBYTE_VALUE',
        message: expect.stringMatching(/it must be a text/) as string,
      })
    }
    const stopStrings = 5 as unknown as string
    await expect(model.generate(PROMPT, { stopStrings })).rejects.toThrow(
      /5 is not a text or a list of texts/,
    )
    expect(() => model.forward('abc' as unknown as number[])).toThrow(/abc is not a list of token ids/)
  })

  it('looks at the last token of a loss too', async () => {
    for (const token of [-1, 1e9]) {
      await expect(model.loss([1, token])).rejects.toMatchObject({ code: 'ERR_HALFBYTE_VALUE' })
    }
  })

  it('is over when the model is disposed, and says so', async () => {
    const other = await AutoModelForCausalLM.fromPretrained(join(root, 'models', 'tinypy-2m'), { device })
    other.dispose()
    await expect(other.generate(PROMPT)).rejects.toMatchObject({
      code: 'ERR_HALFBYTE_DISPOSED',
      message: expect.stringMatching(/embed_tokens.weight .* is used after its model was disposed/) as string,
    })
  })

  it('streams the parts of the same text', async () => {
    const { text, tokenIds } = await model.generate(PROMPT, { maxNewTokens: 30 })
    const parts = await collect(PROMPT, { maxNewTokens: 30 })
    expect(parts.map((part) => part.text).join('')).toBe(text)
    expect(parts.map((part) => part.tokenId)).toEqual(tokenIds)
    expect(parts.map((part) => part.finishReason)).toEqual([...new Array<undefined>(29), 'length'])
  })

  it('reads a prompt in chunks as it would at once', async () => {
    const long = Array.from({ length: 700 }, (_, i) => ids[i % ids.length]! + (i % 5))
    const seen: number[] = []
    const { tokenIds } = await model.generate(long, {
      maxNewTokens: 4,
      onPrefill: (done, total) => {
        expect(total).toBe(700)
        seen.push(done)
      },
    })
    expect(tokenIds).toEqual(await greedy(long, 4))
    expect(seen.length).toBeGreaterThan(1)
    expect(seen.at(-1)).toBe(700)
  })

  it('generates for prompts of different lengths as for each of them', async () => {
    const prompts = [PROMPT, 'import', [5], 'class Node:\n    def __init__(self, value):\n'.repeat(12)]
    const together = await model.generate(prompts, { maxNewTokens: 10 })
    expect(together.length).toBe(4)
    for (const [i, prompt] of prompts.entries()) {
      expect(together[i]).toEqual(await model.generate(prompt as string, { maxNewTokens: 10 }))
    }
  })

  it('stops each sequence of a batch where it ends', async () => {
    const first = await model.generate(PROMPT, { maxNewTokens: 8 })
    const eos = first.tokenIds[3]!
    const [a, b] = await model.generate([PROMPT, 'import os'], { maxNewTokens: 8, eosTokenId: eos })
    expect(a!.tokenIds).toEqual(first.tokenIds.slice(0, first.tokenIds.indexOf(eos) + 1))
    expect(a!.finishReason).toBe('eos')
    expect(b!.tokenIds.length === 8 || b!.tokenIds.at(-1) === eos).toBe(true)
  })

  it('takes a list of end tokens, and none before minNewTokens', async () => {
    const { tokenIds } = await model.generate(PROMPT, { maxNewTokens: 8 })
    const eosTokenId = [4000, tokenIds[2]!]
    const ended = await model.generate(PROMPT, { maxNewTokens: 8, eosTokenId })
    expect(ended).toMatchObject({
      finishReason: 'eos',
      tokenIds: tokenIds.slice(0, tokenIds.indexOf(tokenIds[2]!) + 1),
    })
    const later = await model.generate(PROMPT, { maxNewTokens: 8, minNewTokens: 6, eosTokenId })
    expect(later.tokenIds.slice(0, 6).some((id) => eosTokenId.includes(id))).toBe(false)
    expect(later.tokenIds.length).toBeGreaterThanOrEqual(6)
  })

  it('stops at a stop string, also across tokens, and leaves it out', async () => {
    const { text } = await model.generate(PROMPT, { maxNewTokens: 40 })
    const stop = text.slice(13, 19)
    const at = text.indexOf(stop)
    const result = await model.generate(PROMPT, { maxNewTokens: 40, stopStrings: ['never there', stop] })
    expect(result).toMatchObject({ text: text.slice(0, at), finishReason: 'stop' })
    const parts = await collect(PROMPT, { maxNewTokens: 40, stopStrings: stop })
    expect(parts.map((part) => part.text).join('')).toBe(text.slice(0, at))
    expect(parts.at(-1)!.finishReason).toBe('stop')
    const none = await model.generate(PROMPT, { maxNewTokens: 10, stopStrings: 'never there' })
    expect(text.startsWith(none.text)).toBe(true)
  })

  it('draws the same tokens from the same seed, and others from another', async () => {
    const options = {
      maxNewTokens: 24,
      temperature: 1.2,
      topP: 0.95,
      minP: 0.01,
      topK: 200,
      eosTokenId: null,
    }
    const draw = async (seed: number) => (await model.generate(PROMPT, { ...options, seed })).tokenIds
    const first = await draw(1)
    expect(await draw(1)).toEqual(first)
    expect(await draw(2)).not.toEqual(first)
    const [a, b] = await model.generate([PROMPT, PROMPT], { ...options, seed: 1 })
    expect(a!.tokenIds).toEqual(first)
    expect(b!.tokenIds).not.toEqual(first)
  })

  it('is greedy with temperature 0, topK 1 or a tiny topP', async () => {
    const { tokenIds } = await model.generate(PROMPT, { maxNewTokens: 10 })
    for (const options of [
      { temperature: 0 },
      { temperature: 1e-40, seed: 1 },
      { topK: 1 },
      wrong({ topK: null, topP: null, doSample: null }),
      { topP: 1e-9 },
      { minP: 1 },
      { doSample: false, temperature: 2 },
    ]) {
      expect((await model.generate(PROMPT, { maxNewTokens: 10, ...options })).tokenIds).toEqual(tokenIds)
    }
  })

  it('repeats less under a repetition penalty', async () => {
    const distinct = async (repetitionPenalty: number) =>
      new Set(
        (await model.generate(PROMPT, { maxNewTokens: 60, repetitionPenalty, eosTokenId: null })).tokenIds,
      ).size
    expect(await distinct(1.5)).toBeGreaterThan((await distinct(1)) + 10)
  })

  describe('frees everything', () => {
    const measure = async (body: () => Promise<void>) => {
      // tables of positions stay with the model
      model.model.prepare(2048, device)
      await model.generate(ids, { maxNewTokens: 2 })
      const before = await baselineMemory(device)
      await body()
      expect(await allocatedMemory(device)).toBeLessThanOrEqual(before)
    }

    it('at the end', () =>
      measure(async () => {
        await model.generate([PROMPT, 'x'], { maxNewTokens: 20, temperature: 0.8, repetitionPenalty: 1.1 })
      }))

    it('when the loop is left', () =>
      measure(async () => {
        let count = 0
        for await (const _part of model.stream(PROMPT, { maxNewTokens: 500 })) if (++count === 5) break
        expect(count).toBe(5)
      }))

    it('when the body of the loop throws', () =>
      measure(async () => {
        const loop = async () => {
          for await (const part of model.stream(PROMPT, { maxNewTokens: 500 }))
            throw new Error(`at ${part.tokenId}`)
        }
        await expect(loop()).rejects.toThrow(/^at \d+$/)
      }))

    it('when return() or throw() is called on the iterator', () =>
      measure(async () => {
        const a = model.stream(PROMPT, { maxNewTokens: 500 })
        await a.next()
        await a.return(undefined as never)
        expect((await a.next()).done).toBe(true)
        const b = model.stream(PROMPT, { maxNewTokens: 500 })
        await b.next()
        await expect(b.throw(new Error('out'))).rejects.toThrow('out')
        const unused = model.stream(PROMPT)
        await unused.return(undefined as never)
      }))

    it('when it is aborted, which rejects with the reason', () =>
      measure(async () => {
        const reason = new Error('enough')
        const controller = new AbortController()
        const { signal } = controller
        let count = 0
        const loop = async () => {
          for await (const _part of model.stream(PROMPT, { maxNewTokens: 1000, signal })) {
            if (++count === 3) controller.abort(reason)
          }
        }
        await expect(loop()).rejects.toBe(reason)
        expect(count).toBe(3)
        await expect(model.generate(PROMPT, { signal })).rejects.toBe(reason)
        // while the prompt is read
        const reading = new AbortController()
        const long = new Array<number>(2000).fill(7)
        const promise = model.generate(long, {
          signal: reading.signal,
          onPrefill: () => reading.abort(reason),
        })
        await expect(promise).rejects.toBe(reason)
      }))
  })

  it('does not disturb another call that runs at the same time', async () => {
    const alone = await model.generate(PROMPT, { maxNewTokens: 16 })
    const other = await model.generate('import sys', { maxNewTokens: 16 })
    const both = await Promise.all([
      model.generate(PROMPT, { maxNewTokens: 16 }),
      model.generate('import sys', { maxNewTokens: 16 }),
    ])
    expect(both).toEqual([alone, other])
  })

  it('ends at the last position of the model', async () => {
    const { maxPositions } = model.spec
    const long = new Array<number>(maxPositions - 3).fill(9)
    const { tokenIds, finishReason } = await model.generate(long, { maxNewTokens: 50, eosTokenId: null })
    expect(tokenIds.length).toBe(3)
    expect(finishReason).toBe('length')
  })

  it.each<[string, string | number[], GenerateOptions, string, RegExp]>([
    [
      'a prompt beyond the positions',
      new Array<number>(2049).fill(5),
      {},
      'VALUE',
      /2049 tokens, the model has positions for 2048 \(max_position_embeddings\)/,
    ],
    [
      'a prompt that leaves no room',
      new Array<number>(2048).fill(5),
      {},
      'VALUE',
      /fills all 2048 positions/,
    ],
    ['no tokens', [], {}, 'VALUE', /no tokens/],
    ['a token that is not there', [4096], {}, 'VALUE', /token id 4096 .* ids 0 to 4095/],
    ['half a token', [1.5], {}, 'VALUE', /token id 1.5/],
    ['a negative temperature', 'x', { temperature: -1 }, 'VALUE', /temperature is -1/],
    ['a topP above 1', 'x', { topP: 2 }, 'VALUE', /topP is 2, it must be a number from 0 to 1/],
    ['half a topK', 'x', { topK: 0.5 }, 'VALUE', /topK is 0.5/],
    ['no new tokens', 'x', { maxNewTokens: 0 }, 'VALUE', /maxNewTokens is 0/],
    ['a maxLength below the prompt', 'import os', { maxLength: 1 }, 'VALUE', /maxLength 1 leaves no room/],
    ['a penalty of 0', 'x', { repetitionPenalty: 0 }, 'VALUE', /repetitionPenalty is 0/],
    ['half a seed', 'x', { seed: 0.5 }, 'VALUE', /seed is 0.5/],
    ['a penalty in words', 'x', wrong({ repetitionPenalty: '1.2' }), 'VALUE', /repetitionPenalty is "1.2"/],
    [
      'doSample in words',
      'x',
      wrong({ doSample: 'false' }),
      'VALUE',
      /doSample is "false", .* true or false/,
    ],
    ['skipping in words', 'x', wrong({ skipSpecialTokens: 'no' }), 'VALUE', /skipSpecialTokens is "no"/],
    ['an end that is no token', 'x', wrong({ eosTokenId: {} }), 'VALUE', /eosTokenId is \[object Object\]/],
    ['an end that is true', 'x', wrong({ eosTokenId: true }), 'VALUE', /eosTokenId is true/],
    ['a tokenizer that is none', 'x', wrong({ tokenizer: 'gpt2' }), 'VALUE', /tokenizer is "gpt2"/],
    ['an empty stop string', 'x', { stopStrings: '' }, 'VALUE', /stopStrings: ""/],
    [
      'a misspelt option',
      'x',
      { max_new_tokens: 5 } as GenerateOptions,
      'VALUE',
      /unknown option max_new_tokens; its name is maxNewTokens/,
    ],
    [
      'an option that is none',
      'x',
      { beams: 5 } as GenerateOptions,
      'VALUE',
      /unknown option beams; the options are maxNewTokens, /,
    ],
    ['a signal that is none', 'x', { signal: {} as AbortSignal }, 'VALUE', /signal must be an AbortSignal/],
  ])('refuses %s', async (_, prompt, options, code, message) => {
    await expect(model.generate(prompt, options)).rejects.toMatchObject({
      code: `ERR_HALFBYTE_${code}`,
      message: expect.stringMatching(message) as string,
    })
    await expect(model.stream(prompt, options).next()).rejects.toThrow(message)
  })

  it('needs a tokenizer for texts', async () => {
    const { tokenizer } = model
    model.tokenizer = undefined
    try {
      await expect(model.generate('x')).rejects.toMatchObject({ code: 'ERR_HALFBYTE_TOKENIZER' })
      await expect(model.generate([5], { stopStrings: 'x' })).rejects.toMatchObject({
        code: 'ERR_HALFBYTE_TOKENIZER',
      })
      expect((await model.generate([5], { maxNewTokens: 2 })).text).toBe('')
      const given = await model.generate('x', { tokenizer, maxNewTokens: 2 })
      expect(given.tokenIds.length).toBe(2)
    } finally {
      model.tokenizer = tokenizer
    }
  })
})

describe('pipeline', () => {
  it('loads and generates', async () => {
    using generator = await pipeline('text-generation', join(root, 'models', 'tinypy-2m'), {
      quantizationConfig: { loadIn4bit: true, bnb4bitQuantType: 'nf4' },
    })
    const { text } = await generator.run(PROMPT, { maxNewTokens: 5 })
    expect(text.length).toBeGreaterThan(0)
    let streamed = ''
    for await (const part of generator.stream(PROMPT, { maxNewTokens: 5 })) streamed += part.text
    expect(streamed).toBe(text)
    await expect(generator.run([{ role: 'user', content: 'hi' }])).rejects.toThrow(/chat template/)
    await expect(pipeline('translation' as 'text-generation', '')).rejects.toThrow(
      /"translation" is not a task/,
    )
  })
})

describe('BlockAllocator', () => {
  it('hands every block out once', () => {
    const blocks = new BlockAllocator(5)
    expect(blocks.allocate(2)).toEqual([0, 1])
    expect(blocks.allocate(3)).toEqual([2, 3, 4])
    expect(() => blocks.allocate(1)).toThrow(/1 blocks are wanted, 0 of 5 are free/)
    blocks.release([1, 3])
    expect(blocks.available).toBe(2)
    expect(blocks.allocate(2)).toEqual([1, 3])
    expect(blocks.allocate(0)).toEqual([])
  })
})
