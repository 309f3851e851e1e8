/**
 * A float as Python's json.dumps writes it. Python and JavaScript both choose the shortest digits that read back as the
 * same double, but they differ in form: Python keeps '.0', has exponents of at least two digits, and uses them below
 * 1e-4 and from 1e16 on.
 */
export function jsonFloat(x: number): string {
  if (Number.isNaN(x)) return 'NaN'
  if (!Number.isFinite(x)) return x > 0 ? 'Infinity' : '-Infinity'
  if (x === 0) return Object.is(x, -0) ? '-0.0' : '0.0'
  const [, sign, first, rest = '', exponent] = /^(-?)(\d)(?:\.(\d+))?e([+-]\d+)$/.exec(x.toExponential())!
  const power = Number(exponent)
  if (power < -4 || power >= 16) {
    const size = String(Math.abs(power)).padStart(2, '0')
    return `${sign}${first}${rest && `.${rest}`}e${power < 0 ? '-' : '+'}${size}`
  }
  const digits = `${first}${rest}`
  if (power < 0) return `${sign}0.${'0'.repeat(-power - 1)}${digits}`
  const whole = digits.slice(0, power + 1).padEnd(power + 1, '0')
  return `${sign}${whole}.${digits.slice(power + 1) || '0'}`
}
