/** Tokens to text as they come: whole characters only, and an eye on stop strings. */
import { HalfbyteError } from '../errors.js'

export interface TokenDecoder {
  decode(ids: readonly number[], options?: { skipSpecialTokens?: boolean }): string
}

/** Tokens of context that a decoder needs to know about spaces. */
const CONTEXT = 6
/** A character has at most this many bytes that stand for themselves until the last has come. */
const HELD = 3

/**
 * Incremental decoding. A token may end in the middle of a character, and may mean other text after another token: so a
 * window of tokens is decoded, and what is new in it given out, but for trailing replacement characters, which may yet
 * become whole ones.
 */
export class TextStream {
  readonly #decoder: TokenDecoder
  readonly #skipSpecialTokens: boolean
  #window: number[]
  /** Text of the window that was given out, or belongs to the context. */
  #given: string

  /** `context`: tokens in front, whose text is not given out. */
  constructor(decoder: TokenDecoder, context: readonly number[] = [], skipSpecialTokens = true) {
    this.#decoder = decoder
    this.#skipSpecialTokens = skipSpecialTokens
    this.#window = context.slice(-CONTEXT)
    this.#given = this.#decode()
  }

  #decode(): string {
    return this.#decoder.decode(this.#window, { skipSpecialTokens: this.#skipSpecialTokens })
  }

  /** The text that has become certain with this token. */
  push(token: number): string {
    this.#window.push(token)
    const text = this.#decode()
    let certain = text.length
    while (certain > 0 && text.length - certain < HELD && text[certain - 1] === '\uFFFD') certain--
    if (!text.startsWith(this.#given)) {
      // the new token changed text that is out already; nothing to take back
      this.#given = text.slice(0, certain)
      return ''
    }
    if (certain <= this.#given.length) return ''
    const fresh = text.slice(this.#given.length, certain)
    if (certain === text.length && this.#window.length > 2 * CONTEXT) {
      this.#window = this.#window.slice(-CONTEXT)
      this.#given = this.#decode()
    } else this.#given = text.slice(0, certain)
    return fresh
  }

  /** What was held back, at the end. */
  flush(): string {
    const text = this.#decode()
    const rest = text.startsWith(this.#given) ? text.slice(this.#given.length) : ''
    this.#given = text
    return rest
  }
}

/** Finds stop strings in text that comes in pieces, and holds back what may be the beginning of one. */
export class StopStrings {
  readonly #stops: readonly string[]
  #held = ''

  constructor(stops: readonly string[]) {
    if (typeof stops.find !== 'function') {
      throw new HalfbyteError(
        'ERR_HALFBYTE_VALUE',
        `stopStrings: ${String(stops)} is not a text or a list of texts`,
      )
    }
    const bad = stops.find((stop) => typeof stop !== 'string' || stop === '')
    if (bad !== undefined) {
      throw new HalfbyteError(
        'ERR_HALFBYTE_VALUE',
        `stopStrings: ${JSON.stringify(bad)} is not a text of at least one character`,
      )
    }
    this.#stops = stops
  }

  /** Text that can go out; with `stop`, the stop string that came after it. */
  push(text: string): { text: string; stop?: string } {
    if (this.#stops.length === 0) return { text }
    const all = this.#held + text
    let first = -1
    let found = ''
    for (const stop of this.#stops) {
      const at = all.indexOf(stop)
      if (at >= 0 && (first < 0 || at < first)) {
        first = at
        found = stop
      }
    }
    if (first >= 0) {
      this.#held = ''
      return { text: all.slice(0, first), stop: found }
    }
    const keep = Math.max(0, ...this.#stops.map((stop) => overlap(all, stop)))
    this.#held = all.slice(all.length - keep)
    return { text: all.slice(0, all.length - keep) }
  }

  flush(): string {
    const rest = this.#held
    this.#held = ''
    return rest
  }
}

/** Length of the longest end of `text` that `stop` begins with, short of all of it. */
function overlap(text: string, stop: string): number {
  for (let n = Math.min(text.length, stop.length - 1); n > 0; n--) {
    if (text.endsWith(stop.slice(0, n))) return n
  }
  return 0
}
