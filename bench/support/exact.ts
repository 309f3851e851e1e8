/** ‖found - expected‖ / ‖expected‖. */
export function relative(found: readonly number[], expected: readonly number[]): number {
  let error = 0
  let size = 0
  for (const [i, value] of expected.entries()) {
    error += (found[i]! - value) ** 2
    size += value ** 2
  }
  return Math.sqrt(error / size)
}
