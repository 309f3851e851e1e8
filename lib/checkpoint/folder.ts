/** The folder of a model as callers name it: a path, a file: URL, or the text of one. */
import { existsSync, statSync } from 'node:fs'
import { dirname } from 'node:path'
import { fileURLToPath } from 'node:url'
import { HalfbyteError } from '../errors.js'
import { checkpointError } from './header.js'

/** The path of a folder that is there; errors say what else it is. `where` begins the message about a wrong type. */
export function modelFolder(given: unknown, where: string): string {
  const isUrl = given instanceof URL || (typeof given === 'string' && given.startsWith('file:'))
  if (!isUrl && (typeof given !== 'string' || given === '' || given.includes('\0'))) {
    throw new HalfbyteError(
      'ERR_HALFBYTE_VALUE',
      `${where}: the folder is ${JSON.stringify(given)}; give the path of a model as transformers saves it`,
    )
  }
  let path = given as string
  if (isUrl) {
    try {
      path = fileURLToPath(given)
    } catch (cause) {
      throw new HalfbyteError('ERR_HALFBYTE_VALUE', `${where}: ${String(given)} is not the URL of a folder`, {
        cause,
      })
    }
  }
  if (!existsSync(path)) {
    const looksLikeId = /^[\w.-]+\/[\w.-]+$/.test(path)
    throw checkpointError(
      path,
      'there is no such folder' +
        (looksLikeId
          ? '. Nothing is downloaded here: fetch a model of the Hugging Face hub first, with ' +
            `hf download ${path} --local-dir DIR, and give DIR`
          : ''),
    )
  }
  if (!statSync(path).isDirectory()) {
    throw checkpointError(path, `is a file; give the folder of the model, ${dirname(path)}`)
  }
  return path
}
