/** Counts writes to memory, so that backward() can tell whether what an op had saved is still what it was. */

let watching: Set<Writes> | undefined

/** One for each memory, shared by all views of it. */
export class Writes {
  count = 0
  /** The capture that its memory was allocated in. */
  readonly #born = watching
  /** Something is queued that writes to the memory. */
  add(): void {
    this.count++
    if (watching && this.#born !== watching) watching.add(this)
  }
}

/** Runs `fn`, and tells which memory that was there before is written to in it. */
export function watchWrites(fn: () => void): ReadonlySet<Writes> {
  const before = watching
  const found = (watching = new Set<Writes>())
  try {
    fn()
  } finally {
    watching = before
  }
  return found
}
