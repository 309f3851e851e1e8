import { MAX_HEADER_BYTES, parseHeader } from '../../lib/checkpoint/header'
import { HalfbyteError } from '../../lib/errors'
import { rawSafetensors } from '../support/safetensors'

const parse = (file: Buffer) => parseHeader('a.safetensors', file.length, (b, e) => file.subarray(b, e))

const entry = (dtype: string, shape: unknown, begin: unknown, end: unknown) => ({
  dtype,
  shape,
  data_offsets: [begin, end],
})

describe('a good header', () => {
  it('gives every tensor its place in the file, in the order of the data', () => {
    const header = {
      b: entry('BF16', [3], 8, 14),
      a: entry('F32', [2, 1], 0, 8),
      __metadata__: { format: 'pt' },
    }
    const file = rawSafetensors(header, new Uint8Array(14))
    const parsed = parse(file)
    expect(parsed.metadata).toEqual({ format: 'pt' })
    expect([...parsed.tensors.keys()]).toEqual(['a', 'b'])
    expect(parsed.tensors.get('b')).toEqual({
      file: 'a.safetensors',
      name: 'b',
      dtype: 'BF16',
      shape: [3],
      begin: parsed.dataStart + 8,
      end: file.length,
    })
  })

  it('may be empty, padded with spaces, and hold scalars, empty tensors and sub-byte dtypes', () => {
    expect(parse(rawSafetensors('{}      ')).tensors.size).toBe(0)
    const header = { s: entry('I64', [], 0, 8), z: entry('F32', [0, 5], 8, 8), q: entry('F4', [4], 8, 10) }
    const tensors = parse(rawSafetensors(header, new Uint8Array(10))).tensors
    expect(tensors.get('s')!.shape).toEqual([])
    expect(tensors.get('z')!.begin).toBe(tensors.get('q')!.begin)
  })

  it('keeps names that JavaScript finds special', () => {
    const text =
      '{"__proto__":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a\\"b":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}'
    expect([...parse(rawSafetensors(text, new Uint8Array(2))).tensors.keys()]).toEqual(['__proto__', 'a"b'])
  })
})

const POINTER = 'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e'

describe('a bad header', () => {
  const huge = Buffer.alloc(64)
  huge.writeBigUInt64LE(100_000_000_000n)
  const most = Buffer.alloc(64)
  most.writeBigUInt64LE(0xffffffffffffffffn)
  const announced = Buffer.concat([Buffer.from([200, 0, 0, 0, 0, 0, 0, 0]), Buffer.from('{}')])
  const one = (e: object) => rawSafetensors({ t: e }, new Uint8Array(8))
  const good = entry('F32', [2], 0, 8)

  const cases: [string, Buffer, RegExp][] = [
    ['an empty file', Buffer.alloc(0), /0 bytes are too few/],
    ['seven bytes', Buffer.alloc(7), /7 bytes are too few/],
    ['a header of 100 GB', huge, new RegExp(`claims 100000000000 bytes, the limit is ${MAX_HEADER_BYTES}`)],
    ['a header of 2^64 - 1 bytes', most, /claims 18446744073709551615 bytes/],
    ['a header longer than the file', announced, /truncated: the header takes 208 bytes, the file has 10/],
    [
      'a pointer of Git LFS',
      Buffer.from(`${POINTER}\nsize 4976698672\n`),
      /pointer of Git LFS.*git lfs pull/,
    ],
    ['no header', Buffer.alloc(8), /does not begin with "\{"/],
    ['something else', rawSafetensors('PK\u0003\u0004zip'), /does not begin with "\{"/],
    ['broken UTF-8', Buffer.concat([Buffer.from([3, 0, 0, 0, 0, 0, 0, 0, 0x7b, 0xff, 0x7d])]), /not UTF-8/],
    ['broken JSON', rawSafetensors('{"a": '), /not JSON/],
    [
      'a name twice',
      rawSafetensors(`{"t":${JSON.stringify(good)},"\\u0074":${JSON.stringify(good)}}`, new Uint8Array(8)),
      /"t" twice/,
    ],
    [
      'a field twice',
      rawSafetensors('{"t":{"dtype":"U8","dtype":"I8","shape":[0],"data_offsets":[0,0]}}'),
      /"dtype" twice/,
    ],
    ['metadata of numbers', rawSafetensors({ __metadata__: { n: 1 } }), /__metadata__/],
    ['an entry that is no object', rawSafetensors({ t: 5 }), /tensor "t" is not described by an object/],
    ['an unknown field', one({ ...good, extra: 1 }), /unknown field "extra"/],
    ['an unknown dtype', one(entry('F31', [2], 0, 8)), /tensor "t" has the unknown dtype "F31"/],
    ['a dtype named like a method', one(entry('toString', [2], 0, 8)), /unknown dtype "toString"/],
    ['a negative length', one(entry('F32', [-2], 0, 8)), /shape \[-2\]/],
    ['a fractional length', one(entry('F32', [0.5], 0, 8)), /shape \[0.5\]/],
    ['a shape that is no array', one(entry('F32', 2, 0, 8)), /shape 2/],
    ['an absurd shape', one(entry('F32', [2 ** 52, 2 ** 52], 0, 8)), /absurd shape/],
    [
      'a shape that overflows 64 bits to the right size',
      one(entry('U8', [2 ** 33, 2 ** 31], 0, 0)),
      /absurd shape/,
    ],
    ['offsets that are no pair', one({ ...good, data_offsets: [0] }), /data_offsets \[0\]/],
    ['a negative offset', one(entry('F32', [2], -8, 0)), /data_offsets \[-8,0\]/],
    [
      'an offset beyond 2^53',
      rawSafetensors(
        '{"t":{"dtype":"U8","shape":[0],"data_offsets":[18446744073709551615,18446744073709551615]}}',
      ),
      /data_offsets/,
    ],
    ['an end before the begin', one(entry('F32', [2], 8, 0)), /ends at byte 0, before it begins at 8/],
    [
      'a size that is not the shape’s',
      one(entry('F32', [3], 0, 8)),
      /takes 12 bytes by its dtype F32 and shape \[3\], but 8/,
    ],
    ['half bytes', one(entry('F4', [3], 0, 2)), /does not fill whole bytes/],
    [
      'an overlap',
      rawSafetensors({ a: good, b: entry('F32', [2], 4, 12) }, new Uint8Array(12)),
      /tensor "b" begins at byte 4 of the data and overlaps "a", which ends at 8/,
    ],
    [
      'a hole',
      rawSafetensors({ a: good, b: entry('F32', [2], 12, 20) }, new Uint8Array(20)),
      /leaves a hole of 4 bytes/,
    ],
    ['a hole at the start', one(entry('F32', [1], 4, 8)), /leaves a hole of 4 bytes/],
    ['truncated data', rawSafetensors({ t: good }, new Uint8Array(7)), /truncated: tensor "t" ends at byte/],
    [
      'bytes after the data',
      rawSafetensors({ t: good }, new Uint8Array(9)),
      /1 bytes follow the last tensor/,
    ],
  ]

  it.each(cases)('%s', (_, file, message) => {
    expect(() => parse(file)).toThrow(message)
    try {
      parse(file)
    } catch (error) {
      expect(error).toBeInstanceOf(HalfbyteError)
      expect((error as HalfbyteError).code).toBe('ERR_HALFBYTE_CHECKPOINT')
      expect((error as HalfbyteError).message).toContain('a.safetensors: ')
    }
  })

  it('is never read beyond the file, whatever its bytes', () => {
    const good = rawSafetensors(
      { a: entry('F32', [2], 0, 8), b: entry('U8', [3], 8, 11) },
      new Uint8Array(11),
    )
    let accepted = 0
    for (let i = 0; i < good.length - 11; i++) {
      for (const flip of [1, 2, 16, 128, 255]) {
        const bad = Buffer.from(good)
        bad[i]! ^= flip
        try {
          const { tensors } = parse(bad)
          accepted++
          for (const { begin, end } of tensors.values()) {
            expect(begin).toBeGreaterThanOrEqual(8)
            expect(end).toBeLessThanOrEqual(bad.length)
          }
        } catch (error) {
          expect(error).toBeInstanceOf(HalfbyteError)
        }
      }
    }
    expect(accepted).toBeGreaterThan(0)
  })
})
