import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { HalfbyteError } from '../../lib/errors'
import { StopStrings, TextStream } from '../../lib/generation/text'
import { AutoTokenizer, Tokenizer, type ChatMessage } from '../../lib/generation/tokenizer'
import { root, temporaryFolder } from '../support/files'

const model = join(root, 'models', 'tinypy-2m')

describe('Tokenizer', () => {
  const folder = temporaryFolder()
  let tokenizer: Tokenizer
  beforeAll(async () => {
    tokenizer = await AutoTokenizer.fromPretrained(model)
  })

  it('decodes what it encodes', () => {
    for (const text of ['def f(x):\n    return x + 1\n', 'a , b !', 'naïve 漢字 🙂👩‍👩‍👧 \u0000', '']) {
      expect(tokenizer.decode(tokenizer.encode(text))).toBe(text)
    }
  })

  it('knows its special tokens', () => {
    expect(tokenizer.bosTokenId).toBe(0)
    expect(tokenizer.eosTokenId).toBe(0)
    expect(tokenizer.eosToken).toBe(tokenizer.idToToken(0))
    expect(tokenizer.padToken).toBe(tokenizer.idToToken(1))
    expect(tokenizer.tokenToId(tokenizer.bosToken!)).toBe(tokenizer.bosTokenId)
    expect(tokenizer.padTokenId).toBe(1)
    expect(tokenizer.allSpecialIds).toEqual([0, 1])
    const ids = tokenizer.encode('a<|endoftext|>b')
    expect(ids).toContain(0)
    expect(tokenizer.decode(ids)).toBe('a<|endoftext|>b')
    expect(tokenizer.decode(ids, { skipSpecialTokens: true })).toBe('ab')
  })

  it('leaves out ids beyond its vocabulary, and refuses what is no id', () => {
    expect(tokenizer.decode([...tokenizer.encode('x'), 1e6])).toBe('x')
    expect(() => tokenizer.decode([-1])).toThrow(/-1 is not a token id/)
  })

  it('says what is wrong with a folder', async () => {
    await expect(AutoTokenizer.fromPretrained(folder)).rejects.toMatchObject({
      code: 'ERR_HALFBYTE_TOKENIZER',
    })
    writeFileSync(join(folder, 'tokenizer.json'), '{"model": {}}')
    await expect(AutoTokenizer.fromPretrained(folder)).rejects.toThrow(/tokenizer.json cannot be used/)
    writeFileSync(join(folder, 'tokenizer.json'), '{')
    await expect(AutoTokenizer.fromPretrained(folder)).rejects.toThrow(/not JSON/)
    writeFileSync(
      join(folder, 'tokenizer.json'),
      'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n',
    )
    await expect(AutoTokenizer.fromPretrained(folder)).rejects.toThrow(/tokenizer.json: a pointer of Git LFS/)
  })
})

describe('chat templates', () => {
  const json = JSON.parse(readFileSync(join(model, 'tokenizer.json'), 'utf8')) as object
  const make = (templates: Record<string, string>) =>
    new Tokenizer(json, { bos_token: { content: '<|endoftext|>' } }, new Map(Object.entries(templates)))
  const template = `{{ bos_token }}
{%- for message in messages %}
  {%- if message.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('no role ' ~ message.role) }}{% endif %}
  {{- '[' ~ message.role ~ ']' ~ message.content | trim ~ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '[assistant]' }}{% endif %}`
  const chat = [
    { role: 'user', content: ' hi ' },
    { role: 'assistant', content: 'ho' },
  ]

  it('renders a conversation to text and to ids', () => {
    const tokenizer = make({ default: template })
    const text = tokenizer.applyChatTemplate(chat, { tokenize: false, addGenerationPrompt: true })
    expect(text).toBe('<|endoftext|>[user]hi\n[assistant]ho\n[assistant]')
    const ids = tokenizer.applyChatTemplate(chat, { addGenerationPrompt: true })
    expect(ids[0]).toBe(0)
    expect(tokenizer.decode(ids)).toBe(text)
  })

  it('ends with the final message that is to be continued', () => {
    const text = make({ default: template }).applyChatTemplate(chat, {
      tokenize: false,
      continueFinalMessage: true,
    })
    expect(text).toBe('<|endoftext|>[user]hi\n[assistant]ho')
  })

  it('takes the template for tools when there are tools', () => {
    const tokenizer = make({ default: 'plain', tool_use: 'tools: {{ tools | length }}' })
    expect(tokenizer.applyChatTemplate(chat, { tokenize: false })).toBe('plain')
    expect(tokenizer.applyChatTemplate(chat, { tokenize: false, tools: [{}, {}] })).toBe('tools: 2')
    expect(tokenizer.applyChatTemplate(chat, { tokenize: false, chatTemplate: 'own {{ x }}', x: 1 })).toBe(
      'own 1',
    )
  })

  type Options = { messages?: ChatMessage[] } & Record<string, unknown>
  it.each<[string, Record<string, string>, Options, RegExp]>([
    ['no template', {}, {}, /has no chat template/],
    ['templates of other names', { rag: 'x' }, {}, /only rag/],
    ['a broken template', { default: '{% for %}' }, {}, /not valid/],
    [
      'an exception in it',
      { default: template },
      { messages: [{ role: 'pirate', content: '' }] },
      /no role pirate/,
    ],
    [
      'options at odds',
      { default: template },
      { addGenerationPrompt: true, continueFinalMessage: true },
      /exclude/,
    ],
  ])('complains about %s', (_, templates, { messages = chat, ...options }, message) => {
    const run = () => make(templates).applyChatTemplate(messages, options)
    expect(run).toThrow(message)
    expect(run).toThrow(HalfbyteError)
  })
})

describe('TextStream', () => {
  let tokenizer: Tokenizer
  beforeAll(async () => {
    tokenizer = await AutoTokenizer.fromPretrained(model)
  })

  const texts = [
    'def read(path):\n    """Reads – all of it – 漢字かな交じり文."""\n',
    '🙂👩‍👩‍👧‍👦🏳️‍🌈 naïve café ½',
    'x = "\uFFFD\uFFFD" # real replacement characters\uFFFD',
  ]

  it.each(texts)('gives whole characters only, and all of them: %j', (text) => {
    const ids = tokenizer.encode(text)
    const stream = tokenizer.decodeStream()
    const parts = ids.map((id) => stream.push(id))
    const flushed = stream.flush()
    expect(parts.join('') + flushed).toBe(text)
    if (!text.includes('\uFFFD')) {
      expect(flushed).toBe('')
      for (const part of parts) expect(part).not.toContain('\uFFFD')
    }
  })

  it('gives text as soon as it is certain', () => {
    const ids = tokenizer.encode('def f():\n    return 1')
    const stream = tokenizer.decodeStream()
    for (const id of ids) expect(stream.push(id)).toBe(tokenizer.decode([id]))
  })

  it('flushes a character that stays incomplete', () => {
    const [first, ...rest] = tokenizer.encode('🙂')
    expect(rest.length).toBeGreaterThan(0)
    const stream = tokenizer.decodeStream()
    expect(stream.push(first!)).toBe('')
    expect(stream.flush()).toMatch(/^\uFFFD+$/)
  })

  it('does not repeat the context', () => {
    const context = tokenizer.encode('def f(')
    const stream = tokenizer.decodeStream({ context })
    expect(
      tokenizer
        .encode('x):')
        .map((id) => stream.push(id))
        .join(''),
    ).toBe('x):')
  })

  it('keeps the space that a decoder drops at the start of a text', () => {
    // like sentencepiece: ▁ is a space, but for the first
    const words = ['▁Hello', '▁world', '!', '▁Bye']
    const decode = (ids: readonly number[]) =>
      ids
        .map((id) => words[id]!)
        .join('')
        .replaceAll('▁', ' ')
        .replace(/^ /, '')
    const stream = new TextStream({ decode }, [0])
    expect([1, 2, 3].map((id) => stream.push(id))).toEqual([' world', '!', ' Bye'])
    const fresh = new TextStream({ decode })
    expect([0, 1].map((id) => fresh.push(id))).toEqual(['Hello', ' world'])
  })

  it('takes bytes that count for themselves until the last has come', () => {
    // like byte fallback: an incomplete character is one replacement character a byte
    const bytes = [...Buffer.from('é🙂!')]
    const decode = (ids: readonly number[]) => {
      const text = Buffer.from(ids).toString()
      return text.replace(/\uFFFD$/, () =>
        '\uFFFD'.repeat(ids.length - Buffer.from(text.slice(0, -1)).length),
      )
    }
    const stream = new TextStream({ decode })
    expect(bytes.map((byte) => stream.push(byte))).toEqual(['', 'é', '', '', '', '🙂', '!'])
  })

  it('stays fast: the window does not grow with the text', () => {
    let longest = 0
    const decode = (ids: readonly number[]) => {
      longest = Math.max(longest, ids.length)
      return ids.map((id) => String.fromCharCode(97 + (id % 26))).join('')
    }
    const stream = new TextStream({ decode })
    let text = ''
    for (let i = 0; i < 1000; i++) text += stream.push(i)
    expect(text.length).toBe(1000)
    expect(longest).toBeLessThan(32)
  })
})

describe('StopStrings', () => {
  const run = (stops: string[], parts: string[]) => {
    const watch = new StopStrings(stops)
    let text = ''
    for (const part of parts) {
      const { text: out, stop } = watch.push(part)
      text += out
      if (stop !== undefined) return { text, stop }
    }
    return { text: text + watch.flush() }
  }

  it('finds a stop string across parts, and gives nothing of it away', () => {
    expect(run(['\n\nclass'], ['a\n', '\ncl', 'ass B'])).toEqual({ text: 'a', stop: '\n\nclass' })
    expect(run(['END'], ['E', 'EN', 'END'])).toEqual({ text: 'EEN', stop: 'END' })
    expect(run(['aab'], ['a', 'a', 'a', 'b', 'c'])).toEqual({ text: 'a', stop: 'aab' })
  })

  it('gives back what turned out to be no stop string', () => {
    expect(run(['END'], ['E', 'N', ' E'])).toEqual({ text: 'EN E' })
  })

  it('takes the first of several', () => {
    expect(run(['c', 'b'], ['abc'])).toEqual({ text: 'a', stop: 'b' })
  })

  it('holds back only what may begin a stop string', () => {
    const watch = new StopStrings(['###'])
    expect(watch.push('text #').text).toBe('text ')
    expect(watch.push('!').text).toBe('#!')
  })

  it('refuses an empty one', () => {
    expect(() => new StopStrings([''])).toThrow(/stopStrings: ""/)
  })
})
