import { matchesModule } from '../../lib/index.js'

describe('names in skip lists', () => {
  const cases: [string, string, boolean][] = [
    ['lm_head', 'lm_head', true],
    ['lm_head', 'lm_head2', false],
    ['lm_head', 'model.lm_head', true],
    ['v_proj', 'model.layers.0.self_attn.v_proj', true],
    ['v_proj', 'model.layers.0.self_attn.kv_proj', false],
    ['v_proj', 'model.layers.0.self_attn.qkv_proj', false],
    ['model.layers.1', 'model.layers.1.mlp.up_proj', true],
    ['model.layers.1', 'model.layers.10.mlp.up_proj', false],
    ['model.layers.1', 'model.layers.11', false],
    ['layers.1', 'model.layers.1.mlp.up_proj', true],
    ['vision', 'model.vision.layers.0.q', true],
    ['vision', 'model.vision_tower.layers.0.q', false],
    ['gate', 'mlp.gate_up_proj', false],
    ['gate', 'mlp.gate', true],
    ['model.layers.*.mlp', 'model.layers.7.mlp.up_proj', true],
    ['model.layers.*.mlp', 'model.layers.7.self_attn.q_proj', false],
    ['*_proj', 'model.layers.7.self_attn.q_proj', true],
    ['?_proj', 'model.layers.7.self_attn.qkv_proj', false],
    ['layers.*.q_proj', 'model.layers.0.self_attn.q_proj', false],
    ['layers.**.q_proj', 'model.layers.0.self_attn.q_proj', true],
    ['model.**', 'model.layers.0', true],
    ['model.**.head', 'model.head', true],
    ['layers.[01]', 'model.layers.0', false],
    ['h(', 'model.h', false],
    ['', 'model', false],
  ]
  it.each(cases)('%p and %p: %p', (entry, path, expected) => {
    expect(matchesModule(entry, path)).toBe(expected)
  })
})
