export function emitWarning(message: string): void {
  process.emitWarning(message, 'HalfbyteWarning')
}
