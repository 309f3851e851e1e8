// Lists a folder's sources, for binding.gyp, which cannot glob:
//   node scripts/sources.cjs kernels .cc
const { readdirSync } = require('node:fs')

const [folder, extension] = process.argv.slice(2)
const names = readdirSync(folder, { recursive: true }).filter((name) => name.endsWith(extension))
process.stdout.write(
  names
    .sort()
    .map((name) => `${folder}/${name}`)
    .join('\n'),
)
