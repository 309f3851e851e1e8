/** Options that every command has. */
import type { OptionTable } from './command.js'

export const commonOptions: OptionTable = {
  device: {
    value: 'NAME',
    help: 'cpu, cuda, cuda:1, ... (default: HALFBYTE_DEVICE, else a GPU if there is one)',
  },
  json: { help: 'print one JSON object instead of text' },
  help: { short: 'h', help: 'this text' },
}
