/** Tokenizers of checkpoint folders: tokenizer.json on @huggingface/tokenizers, chat templates on @huggingface/jinja. */
import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { basename, join } from 'node:path'
import { Template } from '@huggingface/jinja'
import * as tokenizers from '@huggingface/tokenizers'
import { modelFolder } from '../checkpoint/folder.js'
import { readJsonFile } from '../checkpoint/json.js'
import { finishSave } from '../checkpoint/replace.js'
import { HalfbyteError } from '../errors.js'
import { TextStream } from './text.js'

/** What is used of the package, whose own types do not resolve under this module system. */
interface Core {
  encode(text: string, options: { add_special_tokens: boolean }): { ids: number[] }
  decode(ids: number[]): string
  token_to_id(token: string): number | undefined
  id_to_token(id: number): string | undefined
  get_added_tokens_decoder(): Map<number, { special: boolean }>
}
const { Tokenizer: CoreTokenizer } = tokenizers as unknown as {
  Tokenizer: new (json: object, config: object) => Core
}

export interface ChatMessage {
  role: string
  content: unknown
  [field: string]: unknown
}

export interface ChatTemplateOptions {
  /** End with the beginning of the model's answer. Default false. */
  addGenerationPrompt?: boolean
  /** The last message is to be continued: nothing follows its text. */
  continueFinalMessage?: boolean
  tools?: readonly unknown[]
  documents?: readonly unknown[]
  /** A template, or the name of one of the tokenizer's templates. */
  chatTemplate?: string
  /** Further variables of the template. */
  [variable: string]: unknown
}

function fail(message: string, cause?: unknown): never {
  throw new HalfbyteError('ERR_HALFBYTE_TOKENIZER', message, cause === undefined ? undefined : { cause })
}

/** A special token in a config: a text, or an object with one. */
function tokenText(value: unknown): string | undefined {
  if (typeof value === 'string') return value
  const content = (value as { content?: unknown } | null | undefined)?.content
  return typeof content === 'string' ? content : undefined
}

const SPECIAL = [
  'bos_token',
  'eos_token',
  'unk_token',
  'sep_token',
  'pad_token',
  'cls_token',
  'mask_token',
] as const
type Special = (typeof SPECIAL)[number]

export class Tokenizer {
  /** Templates by name; 'default' is the usual one. */
  readonly chatTemplates: ReadonlyMap<string, string>
  readonly specialTokens: Readonly<Partial<Record<Special, string>>>
  readonly #core: Core
  readonly #specialIds: ReadonlySet<number>
  readonly #compiled = new Map<string, Template>()

  /** `json` and `config`: tokenizer.json and tokenizer_config.json. */
  constructor(
    json: object,
    config: Record<string, unknown> = {},
    templates: ReadonlyMap<string, string> = new Map(),
  ) {
    try {
      // Python joins decoded tokens as they are unless the config says otherwise
      this.#core = new CoreTokenizer(json, {
        ...config,
        clean_up_tokenization_spaces: config['clean_up_tokenization_spaces'] ?? false,
      })
    } catch (cause) {
      fail(`Tokenizer: tokenizer.json cannot be used (${(cause as Error).message})`, cause)
    }
    const texts: Partial<Record<Special, string>> = {}
    for (const name of SPECIAL) {
      const text = tokenText(config[name])
      if (text !== undefined) texts[name] = text
    }
    this.specialTokens = texts
    this.chatTemplates = templates
    const added = [...this.#core.get_added_tokens_decoder()]
    this.#specialIds = new Set(added.filter(([, token]) => token.special).map(([id]) => id))
  }

  static async fromPretrained(path: string | URL): Promise<Tokenizer> {
    const folder = modelFolder(path, 'Tokenizer.fromPretrained')
    finishSave(folder)
    const file = join(folder, 'tokenizer.json')
    const json = readJsonFile(file, 'ERR_HALFBYTE_TOKENIZER')
    if (!json) {
      const old = ['tokenizer.model', 'vocab.json', 'vocab.txt'].find((name) =>
        existsSync(join(folder, name)),
      )
      fail(
        `${folder}: there is no tokenizer.json` +
          (old ? `, only ${old}: save it with save_pretrained() of a fast tokenizer` : ''),
      )
    }
    const config = readJsonFile(join(folder, 'tokenizer_config.json'), 'ERR_HALFBYTE_TOKENIZER') ?? {}
    const map = readJsonFile(join(folder, 'special_tokens_map.json'), 'ERR_HALFBYTE_TOKENIZER') ?? {}
    const templates = readTemplates(folder, config)
    try {
      return new Tokenizer(json, { ...map, ...config }, templates)
    } catch (cause) {
      return fail(`${folder}: ${(cause as Error).message}`, cause)
    }
  }

  #id(name: Special): number | undefined {
    const text = this.specialTokens[name]
    return text === undefined ? undefined : this.#core.token_to_id(text)
  }

  get bosToken(): string | undefined {
    return this.specialTokens.bos_token
  }

  get eosToken(): string | undefined {
    return this.specialTokens.eos_token
  }

  get padToken(): string | undefined {
    return this.specialTokens.pad_token
  }

  get bosTokenId(): number | undefined {
    return this.#id('bos_token')
  }

  get eosTokenId(): number | undefined {
    return this.#id('eos_token')
  }

  get padTokenId(): number | undefined {
    return this.#id('pad_token')
  }

  /** Ids of all tokens that are special. */
  get allSpecialIds(): number[] {
    return [...this.#specialIds]
  }

  tokenToId(token: string): number | undefined {
    return this.#core.token_to_id(token)
  }

  idToToken(id: number): string | undefined {
    return this.#core.id_to_token(id)
  }

  /** Token ids of a text. addSpecialTokens (default true) puts what the model expects around it. */
  encode(text: string, options: { addSpecialTokens?: boolean } = {}): number[] {
    if (typeof text !== 'string') fail(`encode: a text is needed, not a ${typeof text}`)
    try {
      return this.#core.encode(text, { add_special_tokens: options.addSpecialTokens ?? true }).ids
    } catch (cause) {
      return fail(`encode: ${(cause as Error).message}`, cause)
    }
  }

  /** Text of token ids. */
  decode(ids: Iterable<number>, options: { skipSpecialTokens?: boolean } = {}): string {
    const all = [...ids]
    const kept = options.skipSpecialTokens ? all.filter((id) => !this.#specialIds.has(id)) : all
    const unknown = kept.find((id) => !Number.isInteger(id) || id < 0)
    if (unknown !== undefined) fail(`decode: ${String(unknown)} is not a token id`)
    // a vocabulary may be padded beyond the tokenizer's tokens
    const known = kept.filter((id) => this.#core.id_to_token(id) !== undefined)
    return known.length === 0 ? '' : this.#core.decode(known)
  }

  /** Decoding token by token; see TextStream. */
  decodeStream(options: { context?: readonly number[]; skipSpecialTokens?: boolean } = {}): TextStream {
    return new TextStream(this, options.context, options.skipSpecialTokens ?? true)
  }

  /** The prompt of a conversation, as token ids; as text with tokenize: false. */
  applyChatTemplate(
    messages: readonly ChatMessage[],
    options: ChatTemplateOptions & { tokenize: false },
  ): string
  applyChatTemplate(
    messages: readonly ChatMessage[],
    options?: ChatTemplateOptions & { tokenize?: true },
  ): number[]
  applyChatTemplate(
    messages: readonly ChatMessage[],
    options: ChatTemplateOptions & { tokenize?: boolean } = {},
  ): string | number[] {
    const {
      addGenerationPrompt = false,
      continueFinalMessage = false,
      tokenize = true,
      chatTemplate,
      ...variables
    } = options
    if (addGenerationPrompt && continueFinalMessage) {
      fail('applyChatTemplate: addGenerationPrompt and continueFinalMessage exclude each other')
    }
    const template = this.#template(chatTemplate, variables.tools !== undefined)
    let text: string
    try {
      text = template.render({
        ...this.specialTokens,
        ...variables,
        messages,
        add_generation_prompt: addGenerationPrompt,
      })
    } catch (cause) {
      return fail(`applyChatTemplate: the template failed (${(cause as Error).message})`, cause)
    }
    if (continueFinalMessage) text = upToFinalMessage(text, messages)
    return tokenize ? this.encode(text, { addSpecialTokens: false }) : text
  }

  #template(given: string | undefined, withTools: boolean): Template {
    const name = given ?? (withTools && this.chatTemplates.has('tool_use') ? 'tool_use' : 'default')
    const source = this.chatTemplates.get(name) ?? given
    if (source === undefined) {
      const names = [...this.chatTemplates.keys()]
      fail(
        'applyChatTemplate: the tokenizer has no ' +
          (names.length > 0 ? `default chat template, only ${names.join(', ')}` : 'chat template') +
          '; pass one as chatTemplate',
      )
    }
    let compiled = this.#compiled.get(source)
    if (!compiled) {
      try {
        compiled = new Template(source)
      } catch (cause) {
        fail(`applyChatTemplate: the chat template is not valid (${(cause as Error).message})`, cause)
      }
      this.#compiled.set(source, compiled)
    }
    return compiled
  }
}

/** The rendered conversation without what the template puts behind its last message. */
function upToFinalMessage(text: string, messages: readonly ChatMessage[]): string {
  const content = messages.at(-1)?.content
  const final = typeof content === 'string' ? content : ''
  const at = text.lastIndexOf(final.trim())
  if (final === '' || at < 0)
    fail('applyChatTemplate: the text of the final message is not in the rendered conversation')
  return text.startsWith(final, at)
    ? text.slice(0, at + final.length)
    : text.slice(0, at + final.trim().length)
}

/** chat_template.jinja and additional_chat_templates/NAME.jinja, else chat_template in tokenizer_config.json. */
function readTemplates(folder: string, config: Record<string, unknown>): Map<string, string> {
  const templates = new Map<string, string>()
  const legacy = config['chat_template']
  if (typeof legacy === 'string') templates.set('default', legacy)
  if (Array.isArray(legacy)) {
    for (const entry of legacy as { name?: unknown; template?: unknown }[]) {
      if (typeof entry?.name === 'string' && typeof entry.template === 'string')
        templates.set(entry.name, entry.template)
    }
  }
  const file = join(folder, 'chat_template.jinja')
  if (existsSync(file)) templates.set('default', readFileSync(file, 'utf8'))
  const more = join(folder, 'additional_chat_templates')
  if (existsSync(more)) {
    for (const name of readdirSync(more).filter((name) => name.endsWith('.jinja'))) {
      templates.set(basename(name, '.jinja'), readFileSync(join(more, name), 'utf8'))
    }
  }
  return templates
}

export const AutoTokenizer = {
  /** The tokenizer of a checkpoint folder. */
  fromPretrained: (folder: string | URL): Promise<Tokenizer> => Tokenizer.fromPretrained(folder),
}
