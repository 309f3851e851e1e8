import { JsonText, jsonText, memberTexts } from '../../lib/checkpoint/json'

describe('JSON that is written again', () => {
  const text = `{
  "a": 1e-05, "b" : [1.0, {"a": "}"}],
  "c\\"d": "x, \\"y\\": {",
  "e": {
    "f": [],
    "g": {"h": null}
  },
  "": true,
  "last": -0.0
}
`

  it('has its members as they were', () => {
    const members = memberTexts(text)
    expect([...members.keys()]).toEqual(['a', 'b', 'c"d', 'e', '', 'last'])
    expect(members.get('a')!.text).toBe('1e-05')
    expect(members.get('b')!.text).toBe('[1.0, {"a": "}"}]')
    expect(members.get('c"d')!.text).toBe('"x, \\"y\\": {"')
    expect(members.get('last')!.text).toBe('-0.0')
    const again = JSON.parse(jsonText(Object.fromEntries(members))) as unknown
    expect(again).toEqual(JSON.parse(text))
  })

  it('is empty where there are none', () => {
    expect(memberTexts(' { } ').size).toBe(0)
    expect(jsonText({ a: {}, b: [], c: undefined })).toBe('{\n  "a": {},\n  "b": []\n}')
  })

  it('is indented as Python does', () => {
    expect(jsonText({ a: [1, { b: new JsonText('2.0') }], c: 'é"' })).toBe(
      '{\n  "a": [\n    1,\n    {\n      "b": 2.0\n    }\n  ],\n  "c": "é\\""\n}',
    )
  })
})
