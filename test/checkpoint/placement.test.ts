/** maxMemory and deviceMap as a caller gives them. */
import { CausalLM, getMaxMemory, resolveDeviceMap, type MaxMemory } from '../../lib'
import { unloaded } from '../support/causal_lm'
import { thrown } from '../support/errors'

describe('maxMemory', () => {
  it('reads units, orders places and takes numbers for GPUs', () => {
    const memory = getMaxMemory({
      disk: 9,
      cpu: '1.5 GiB',
      'cpu:1': '2MB',
      1: '500MB',
      'cuda:0': 7,
      10: '8Gb',
    })
    expect(Object.entries(memory)).toEqual([
      ['cuda:0', 7],
      ['cuda:1', 500e6],
      ['cuda:10', 1e9],
      ['cpu:1', 2e6],
      ['cpu', 1.5 * 2 ** 30],
      ['disk', 9],
    ])
    const free = getMaxMemory()
    expect(free['cpu']).toBeGreaterThan(0)
    expect(Object.keys(free).at(-1)).toBe('cpu')
  })

  it.each<[string, MaxMemory, RegExp]>([
    ['a unit that is none', { 0: '10 potatoes' }, /maxMemory\["0"\]: "10 potatoes" is not a size/],
    ['no unit', { cpu: '10' }, /"10" is not a size/],
    ['a negative size', { 0: -1 }, /-1 is not a size/],
    ['half a byte', { 0: 0.5 }, /0.5 is not a size/],
    ['a place that is none', { gpu: '1GB' }, /"gpu" is not a place/],
    ['a place twice', { 0: 1, 'cuda:0': 2 }, /names cuda:0 twice/],
    ['a list', ['1GB'] as never, /must be an object like/],
  ])('has %s', (_, maxMemory, message) => {
    const error = thrown(() => getMaxMemory(maxMemory))
    expect(error.code).toBe('ERR_HALFBYTE_VALUE')
    expect(error.message).toMatch(message)
  })
})

describe('deviceMap', () => {
  const dense = () => unloaded({})
  const packed = () => unloaded({}, { loadIn8bit: true })

  it('takes one place, several by path, and the longest path that fits', () => {
    expect(resolveDeviceMap(dense(), 'cpu')).toEqual({ '': 'cpu' })
    expect(resolveDeviceMap(dense(), 'cpu:0')).toEqual({ '': 'cpu' })
    expect(resolveDeviceMap(packed(), 'cpu')).toEqual({ '': 'cpu' })
    const map = { '': 'cpu:1', 'model.layers.1': 'cpu', 'model.rotary_emb': 'cpu:1' }
    expect(resolveDeviceMap(dense(), map)).toEqual(map)
  })

  it.each<[string, () => CausalLM, unknown, Parameters<typeof resolveDeviceMap>[2], string, RegExp]>([
    ['a device that is not there', dense, 'cuda:99', {}, 'DEVICE', /no device cuda:99/],
    ['one that is not there in a map', dense, { '': 'cpu', lm_head: 99 }, {}, 'DEVICE', /cuda:99/],
    ['one in maxMemory', dense, 'auto', { maxMemory: { 99: '1GB' } }, 'DEVICE', /cuda:99/],
    [
      'a strategy that is none',
      dense,
      'fastest',
      {},
      'VALUE',
      /"fastest" is neither a strategy \(auto, balanced/,
    ],
    ['a list', dense, ['cpu'], {}, 'VALUE', /deviceMap is \["cpu"\]/],
    ['nothing', dense, null, {}, 'VALUE', /deviceMap is null/],
    [
      'a key that matches nothing',
      dense,
      { '': 'cpu', 'model.layer.0': 'cpu' },
      {},
      'VALUE',
      /has no model.layer.0; its modules begin with model, model.embed_tokens/,
    ],
    [
      'a layer that is not there',
      dense,
      { '': 'cpu', 'model.layers.2': 'cpu' },
      {},
      'VALUE',
      /has no model.layers.2/,
    ],
    [
      'a module missed',
      dense,
      { 'model.layers': 'cpu', 'model.embed_tokens': 'cpu', 'model.rotary_emb': 'cpu' },
      {},
      'VALUE',
      /2 tensors of the model are on no place: .*lm_head.weight/,
    ],
    ['a place that is none', dense, { '': 'gpu' }, {}, 'VALUE', /"gpu" is not a place/],
    ['an object for a place', dense, { '': {} }, {}, 'VALUE', /"" is on {}, which is not a place/],
    [
      'limits without a strategy',
      dense,
      'cpu',
      { maxMemory: { cpu: '1GB' } },
      'VALUE',
      /maxMemory is for the strategies/,
    ],
    [
      'no room anywhere',
      dense,
      'auto',
      { maxMemory: { cpu: 10, disk: 10 } },
      'OUT_OF_MEMORY',
      /no place is left/,
    ],
    [
      'quantised layers beside their accelerator',
      packed,
      { '': 'cpu:1', 'model.layers.1.mlp': 'cpu' },
      {},
      'CONFIG',
      /3 quantised modules would not be on an accelerator: model.layers.1.mlp.gate_proj \(cpu\).*llmInt8EnableFp32CpuOffload: true/,
    ],
    [
      'quantised layers on the disk',
      packed,
      { '': 'cpu', 'model.layers.1.mlp.up_proj': 'disk' },
      {},
      'CONFIG',
      /1 quantised module would.*up_proj \(disk\)/,
    ],
    [
      'quantised layers for which the accelerator is too small',
      packed,
      'auto',
      { maxMemory: { 'cpu:1': 1000, cpu: '1GB' } },
      'CONFIG',
      /14 quantised modules/,
    ],
  ])('has %s', (_, model, map, options, code, message) => {
    const error = thrown(() => resolveDeviceMap(model(), map as never, options))
    expect(error.code).toBe(`ERR_HALFBYTE_${code}`)
    expect(error.message).toMatch(message)
  })

  it('lets what is not quantised, or was allowed, lie beside the accelerator', () => {
    expect(resolveDeviceMap(packed(), { '': 'cpu:1', 'model.embed_tokens': 'cpu' })).toEqual({
      '': 'cpu:1',
      'model.embed_tokens': 'cpu',
    })
    const offloadQuantized = true
    const map = { '': 'cpu:1', 'model.layers.1': 'disk' }
    expect(resolveDeviceMap(packed(), map, { offloadQuantized })).toEqual(map)
    const auto = resolveDeviceMap(packed(), 'auto', {
      offloadQuantized,
      maxMemory: { 'cpu:1': 1000, cpu: '1GB' },
    })
    expect(auto).toEqual({ '': 'cpu' })
  })

  it('spreads a model over the devices that are named', () => {
    const map = resolveDeviceMap(dense(), 'balanced', { maxMemory: { 'cpu:1': '1GB', 'cpu:2': '1GB' } })
    expect(new Set(Object.values(map))).toEqual(new Set(['cpu:1', 'cpu:2']))
    expect(
      resolveDeviceMap(dense(), 'sequential', { maxMemory: { 'cpu:1': '1GB', 'cpu:2': '1GB' } }),
    ).toEqual({ '': 'cpu:1' })
  })
})
