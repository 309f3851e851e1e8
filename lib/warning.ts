/** Warnings of the library, by Node's own channel: process.on('warning') sees them. */
export function emitWarning(message: string): void {
  process.emitWarning(message, 'HalfbyteWarning')
}
