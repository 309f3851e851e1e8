/** Tables of text in columns, numbers to the right. The one printer of every command and benchmark. */

export type Cell = string | number | undefined

export interface Column {
  title: string
  align?: 'left' | 'right'
}

/** Lines of a table; a column is right-aligned when it says so, or when its title was given as { align: 'right' }. */
export function formatTable(
  columns: readonly (string | Column)[],
  rows: readonly (readonly Cell[])[],
): string {
  const heads = columns.map((column) => (typeof column === 'string' ? { title: column } : column))
  const cells = rows.map((row) => heads.map((_, i) => text(row[i])))
  const widths = heads.map((head, i) => Math.max(head.title.length, ...cells.map((row) => row[i]!.length)))
  const right = heads.map(
    (head, i) =>
      head.align === 'right' || (!head.align && rows.length > 0 && rows.every((row) => isNumeric(row[i]))),
  )
  const line = (row: readonly string[]) =>
    row
      .map((cell, i) => (right[i] ? cell.padStart(widths[i]!) : cell.padEnd(widths[i]!)))
      .join('  ')
      .trimEnd()
  return [
    line(heads.map((head) => head.title)),
    line(widths.map((width) => '-'.repeat(width))),
    ...cells.map(line),
  ].join('\n')
}

function text(cell: Cell): string {
  return cell === undefined ? '-' : String(cell)
}

function isNumeric(cell: Cell): boolean {
  return (
    cell === undefined || typeof cell === 'number' || /^[-+]?[\d.,]+ ?(%|x|[kMGT]?B|[mun]?s)?$/.test(cell)
  )
}

/** 1234567 as '1.2 MB' (powers of 1000). */
export function formatBytes(bytes: number): string {
  const units = ['B', 'kB', 'MB', 'GB', 'TB']
  let value = bytes
  let unit = 0
  while (value >= 1000 && unit + 1 < units.length) {
    value /= 1000
    unit++
  }
  return `${unit === 0 ? value : value.toFixed(value < 10 ? 2 : 1)} ${units[unit]}`
}

export function formatSeconds(seconds: number): string {
  if (seconds < 1e-3) return `${(seconds * 1e6).toFixed(0)} us`
  if (seconds < 1) return `${(seconds * 1e3).toFixed(0)} ms`
  return seconds < 60
    ? `${seconds.toFixed(1)} s`
    : `${Math.floor(seconds / 60)} min ${(seconds % 60).toFixed(0)} s`
}
