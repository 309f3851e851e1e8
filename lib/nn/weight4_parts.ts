/**
 * What a 4-bit weight [n, k] arrives in: a float weight, or the parts of one that is quantised already, in any order:
 *   weight                                      uint8 [ceil(n k / 2), 1], or as many bytes of another storage dtype
 *   weight.absmax                               float32 [blocks], or uint8 [blocks] when double-quantised, and then also
 *   weight.nested_absmax, .nested_quant_map     float32 [ceil(blocks / 256)], float32 [256]
 *   weight.quant_map                            float32 [16]
 *   weight.quant_state.bitsandbytes__nf4|fp4    uint8, JSON
 */
import { DTYPES, type DType } from '../tensor/dtype.js'
import type { QuantType } from '../tensor/ops.js'
import type { Tensor } from '../tensor/tensor.js'

const PLAIN = ['absmax', 'quant_map']
const NESTED = ['nested_absmax', 'nested_quant_map']
const STATE = /^quant_state\.bitsandbytes__(nf4|fp4)$/

export function packedBytes(n: number, k: number): number {
  return Math.ceil((n * k) / 2)
}

/** Bytes of the statistics of a packed weight [n, k], code tables included. */
export function statisticsBytes(n: number, k: number, blocksize: number, nested: boolean): number {
  const blocks = Math.ceil((n * k) / blocksize)
  return 4 * 16 + (nested ? blocks + 4 * Math.ceil(blocks / 256) + 4 * 256 + 4 : 4 * blocks)
}

/** The parts of one weight: which it takes, and those that have arrived and wait for the others. */
export class Weight4Parts {
  readonly #n: number
  readonly #k: number
  readonly #options: { readonly transposed: boolean; readonly quantType: QuantType }
  #arrived = new Map<string, Tensor>()

  constructor(n: number, k: number, options: { transposed: boolean; quantType: QuantType }) {
    this.#n = n
    this.#k = k
    this.#options = options
  }

  /** The shape of a float weight. */
  get floatShape(): [number, number] {
    return this.#options.transposed ? [this.#k, this.#n] : [this.#n, this.#k]
  }

  isFloatWeight(tensor: Tensor): boolean {
    const [rows, cols] = this.floatShape
    return (
      DTYPES[tensor.dtype].isFloat &&
      tensor.ndim === 2 &&
      tensor.shape[0] === rows &&
      tensor.shape[1] === cols
    )
  }

  accepts(name: string): boolean {
    if (name === 'weight') return true
    const part = name.startsWith('weight.') ? name.slice('weight.'.length) : ''
    return PLAIN.includes(part) || NESTED.includes(part) || STATE.test(part)
  }

  /** Why a tensor cannot be the part of that name, or undefined when it can. */
  reject(name: string, tensor: Tensor): string | undefined {
    if (name === 'weight') {
      const bytes = packedBytes(this.#n, this.#k)
      if (this.isFloatWeight(tensor) || tensor.nbytes === bytes) return undefined
      return (
        `is ${tensor.dtype} [${tensor.shape.join(', ')}]; the model takes float [${this.#n}, ${this.#k}]` +
        `${this.#options.transposed ? ' transposed' : ''}, or ${bytes} packed bytes`
      )
    }
    const wanted: Record<string, [DType[], number?]> = {
      'weight.absmax': [['float32', 'uint8']],
      'weight.quant_map': [['float32'], 16],
      'weight.nested_absmax': [['float32']],
      'weight.nested_quant_map': [['float32'], 256],
    }
    const [dtypes, size] = wanted[name] ?? [['uint8' as const]]
    if (!dtypes.includes(tensor.dtype)) return `is ${tensor.dtype}, it must be ${dtypes.join(' or ')}`
    if (size !== undefined && tensor.size !== size) return `has ${tensor.size} entries, it must have ${size}`
    return undefined
  }

  /** Names of parts that are needed besides those that are there. */
  lacking(there: ReadonlyMap<string, Tensor> = this.#arrived): string[] {
    const weight = there.get('weight')
    if (weight && this.isFloatWeight(weight)) return []
    const nested = there.get('weight.absmax')?.dtype === 'uint8'
    const names = ['weight', ...[...PLAIN, ...(nested ? NESTED : [])].map((part) => `weight.${part}`)]
    const lacking = names.filter((name) => !there.has(name))
    if (![...there.keys()].some((name) => STATE.test(name.slice('weight.'.length)))) {
      lacking.push(`weight.quant_state.bitsandbytes__${this.#options.quantType}`)
    }
    return lacking
  }

  /** Whether some have arrived and others have not. */
  get isWaiting(): boolean {
    return this.#arrived.size > 0
  }

  /** Takes a part over. With the last of them all are the caller's. */
  add(name: string, tensor: Tensor): Map<string, Tensor> | undefined {
    this.#arrived.get(name)?.dispose()
    this.#arrived.set(name, tensor)
    if (this.lacking().length > 0) return undefined
    const parts = this.#arrived
    this.#arrived = new Map()
    return parts
  }

  dispose(): void {
    for (const tensor of this.#arrived.values()) tensor.dispose()
    this.#arrived.clear()
  }
}
