/** A line on stderr that says how far a long step is: after a second, on a terminal, gone at the end. */

const WIDTH = 24

export class Progress {
  readonly #title: string
  readonly #began = performance.now()
  readonly #stream: NodeJS.WriteStream
  #last = 0
  #shown = false

  constructor(title: string, stream: NodeJS.WriteStream = process.stderr) {
    this.#title = title
    this.#stream = stream
  }

  /** `done` of `total`; cheap enough to call for every item. */
  update(done: number, total: number): void {
    const now = performance.now()
    if (!this.#stream.isTTY || now - this.#began < 1000 || now - this.#last < 100) return
    this.#last = now
    this.#shown = true
    const part = total > 0 ? Math.min(1, done / total) : 0
    const filled = Math.round(part * WIDTH)
    const bar = `[${'#'.repeat(filled)}${'.'.repeat(WIDTH - filled)}]`
    this.#stream.write(`\r\x1b[2K${this.#title} ${bar} ${Math.round(part * 100)}%`)
  }

  end(): void {
    if (this.#shown) this.#stream.write('\r\x1b[2K')
    this.#shown = false
  }

  [Symbol.dispose](): void {
    this.end()
  }
}
