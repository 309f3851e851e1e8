/** How far reading may run ahead of the devices that it reads for. */
import type { Device } from '../tensor/device.js'

/** Bytes after which a device is asked how far it is. */
const LAP = 128 << 20
/** Bytes that a GPU may be given ahead: it takes memory for them one tensor after the other. */
const AHEAD = 512 << 20

/**
 * Work that was queued on a device and may not be done. On the CPU what is read lies in memory until it is quantised,
 * by another thread: that stays below `limit`.
 */
export class Backlog {
  readonly #device: Device
  readonly #limit: number
  #laps: { bytes: number; reached: Promise<void> }[] = []
  #bytes = 0
  #lap = 0

  constructor(device: Device, largest: number) {
    this.#device = device
    this.#limit = device.type === 'cuda' ? Math.max(largest, AHEAD) : largest
  }

  /** Waits until there is room for so many bytes more. */
  async room(bytes: number): Promise<void> {
    while (this.#bytes > 0 && this.#bytes + bytes > this.#limit) {
      if (this.#laps.length === 0) this.#mark()
      const lap = this.#laps.shift()!
      await lap.reached
      this.#bytes -= lap.bytes
    }
  }

  add(bytes: number): void {
    this.#bytes += bytes
    this.#lap += bytes
    if (this.#lap >= Math.min(LAP, this.#limit / 4)) this.#mark()
  }

  #mark(): void {
    const reached = this.#device.synchronize()
    reached.catch(() => {}) // whoever waits for it hears of it
    this.#laps.push({ bytes: this.#lap, reached })
    this.#lap = 0
  }
}
