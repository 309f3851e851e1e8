/** How a caller may name the folder of a model, and what is said of anything else. */
import { cpSync, rmSync, symlinkSync } from 'node:fs'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { AutoModelForCausalLM, AutoTokenizer, Checkpoint, HalfbyteError, pipeline } from '../../lib'
import { rejection } from '../support/errors'
import { root, temporaryFolder } from '../support/files'
import { writeTinyModel } from '../support/tiny_model'

const folder = temporaryFolder()
const model = join(folder, 'ein Modell größer 模型')
const load = (path: unknown, options?: object | null) =>
  AutoModelForCausalLM.fromPretrained(path as string, options as object)

beforeAll(() => {
  writeTinyModel(model)
  symlinkSync(model, join(folder, 'link'))
})

test.each([
  ['a path', model],
  ['a path that ends in a slash', `${model}/`],
  ['a link', join(folder, 'link')],
  ['a URL', pathToFileURL(`${model}/`)],
  ['the text of a URL', pathToFileURL(model).href],
])('%s', async (_, path) => {
  using loaded = await load(path)
  expect(loaded.folder).not.toMatch(/^file:/)
  expect(loaded.dtype).toBe('float32')
})

test('a tokenizer and a pipeline take a URL too', async () => {
  const url = pathToFileURL(join(root, 'models', 'tinypy-2m'))
  expect((await AutoTokenizer.fromPretrained(url)).encode('def')).toHaveLength(1)
  using pipe = await pipeline('text-generation', url)
  expect((await pipe.run('def', { maxNewTokens: 2 })).tokenIds).toHaveLength(2)
})

test.each([
  ['a name of the hub', 'someone/a-model', 'ERR_HALFBYTE_CHECKPOINT', /hf download someone\/a-model/],
  ['no folder', join(folder, 'nowhere'), 'ERR_HALFBYTE_CHECKPOINT', /nowhere: there is no such folder$/],
  ['a file', join(model, 'config.json'), 'ERR_HALFBYTE_CHECKPOINT', /is a file; give the folder/],
  [
    'a URL of elsewhere',
    new URL('https://example.com/model'),
    'ERR_HALFBYTE_VALUE',
    /not the URL of a folder/,
  ],
  ['nothing', undefined, 'ERR_HALFBYTE_VALUE', /the folder is undefined/],
  ['a text with a zero', 'a\0b', 'ERR_HALFBYTE_VALUE', /the folder is "a\\u0000b"/],
])('%s', async (_, path, code, message) => {
  for (const attempt of [load(path), AutoTokenizer.fromPretrained(path as string)]) {
    const error = await rejection(attempt)
    expect(error).toBeInstanceOf(HalfbyteError)
    expect(error.code).toBe(code)
    expect(error.message).toMatch(message)
  }
})

test('options that are none', async () => {
  await expect(load(model, null)).rejects.toMatchObject({ code: 'ERR_HALFBYTE_VALUE' })
  using loaded = await load(model)
  await expect(loaded.generate([1], null as never)).rejects.toMatchObject({ code: 'ERR_HALFBYTE_VALUE' })
})

test('a folder that another model is saved into while it is opened gives that model', async () => {
  const [place, next] = [join(folder, 'place'), join(folder, 'next')]
  cpSync(model, place, { recursive: true })
  {
    using quantised = await load(model, { quantizationConfig: { loadIn4bit: true } })
    await quantised.savePretrained(next)
  }
  const open = Checkpoint.open.bind(Checkpoint)
  const spy = jest.spyOn(Checkpoint, 'open').mockImplementationOnce((path) => {
    rmSync(place, { recursive: true })
    cpSync(next, place, { recursive: true })
    return open(path)
  })
  using loaded = await load(place)
  expect(spy).toHaveBeenCalledTimes(2)
  expect(loaded.isLoadedIn4bit).toBe(true)
  spy.mockRestore()
})
