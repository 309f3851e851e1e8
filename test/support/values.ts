/** What a tensor of any dtype holds. */
import type { Tensor } from '../../lib/index.js'
import { fromBfloat16, fromFloat16 } from './reference.js'

export async function numbers(tensor: Tensor): Promise<number[]> {
  const data = await tensor.data()
  if (tensor.dtype === 'float16') return Array.from(data as Uint16Array, fromFloat16)
  if (tensor.dtype === 'bfloat16') return Array.from(data as Uint16Array, fromBfloat16)
  return Array.from(data as ArrayLike<number | bigint>, Number)
}
