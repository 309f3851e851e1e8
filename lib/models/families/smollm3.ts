/** SmolLM3: Llama with layers that have no position embedding. */
import type { ConfigReader } from '../../checkpoint/config.js'
import { readDecoderSpec, readWindows, type DecoderSpec } from '../spec.js'

export function smollm3(config: ConfigReader): DecoderSpec {
  const spec = readDecoderSpec(config)
  const interval = config.count('no_rope_layer_interval', 4)
  // 1 stands for a layer that has it
  const given = config.array('no_rope_layers')
  const windows = config.boolean('use_sliding_window', false) ? readWindows(config) : spec.layers.map(() => 0)
  return {
    ...spec,
    layers: spec.layers.map(({ rope }, i) => ({
      rope: (given ? given[i] === 1 : (i + 1) % interval !== 0) ? rope : null,
      window: windows[i]!,
    })),
  }
}
