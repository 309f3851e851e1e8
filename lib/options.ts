/** Objects of options: names that are not known, and values that are no signal or function where one is called later. */

/** What is wrong with the names of options, or undefined. Python's spelling of a known one is told its name here. */
export function unknownName(
  options: object,
  known: readonly string[],
  what: 'option' | 'field',
): string | undefined {
  const name = Object.keys(options).find((each) => !known.includes(each))
  if (name === undefined) return undefined
  const plain = (text: string) => text.replaceAll(/[_-]/g, '').toLowerCase()
  const like = known.find((each) => plain(each) === plain(name))
  return `unknown ${what} ${name}; ${like ? `its name is ${like}` : `the ${what}s are ${known.join(', ')}`}`
}

/** What is wrong with an option `signal`, or with those named on...; undefined when they can be used. */
export function wrongHandler(options: object): string | undefined {
  for (const [name, value] of Object.entries(options)) {
    if (value === undefined) continue
    // of any realm
    const { throwIfAborted } = (value ?? {}) as Partial<AbortSignal>
    if (name === 'signal' && typeof throwIfAborted !== 'function') return 'signal must be an AbortSignal'
    if (/^on[A-Z]/.test(name) && typeof value !== 'function') return `${name} must be a function`
  }
  return undefined
}
