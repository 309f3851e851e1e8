/**
 * Modules on the disk. What is large of them is in memory only while they run: it is read from the checkpoint where the
 * checkpoint has it as it is needed, else from a file that is written while loading (weights that were quantised on the
 * way in, or converted). While one module runs the next one is read; a third has to wait, so two are in memory at most.
 */
import { rmSync } from 'node:fs'
import { join } from 'node:path'
import { HalfbyteError } from '../errors.js'
import { FiniteCheck } from '../nn/finite.js'
import type { Module } from '../nn/module.js'
import type { PackedWeight } from '../nn/packed.js'
import type { Parameter } from '../nn/parameter.js'
import type { StateEntry } from '../nn/state_dict.js'
import type { Device } from '../tensor/device.js'
import type { DType } from '../tensor/dtype.js'
import { fillInto } from '../tensor/ops/layout.js'
import { Tensor } from '../tensor/tensor.js'
import { keep, tidy } from '../tensor/tidy.js'
import type { Layout } from './dispatch.js'
import type { TensorInfo } from './header.js'
import { DISK } from './max_memory.js'
import { makeFolder, temporaryName } from './replace.js'
import { SafetensorsFile } from './safetensors.js'
import { writeEntries } from './write.js'

/** Tensors of fewer bytes stay in memory: a read of its own costs more than they take. */
const SMALL = 64 << 10
/** Bytes of what is turned round on the way in that are in memory in both forms, three times over. */
const PIECE = 16 << 20

interface Packed {
  path: string
  weight: PackedWeight
  /** Its tensors in the checkpoint, by own name, as they were loaded; none where it was a part of another tensor. */
  parts: Map<string, TensorInfo>
  loaded: boolean
}

interface Plain {
  path: string
  parameter: Parameter
  finite: FiniteCheck
}

/** A module that is brought in as a whole. */
interface Unit {
  path: string
  module: Module
  packed: Packed[]
  plain: Map<string, Plain>
  /** Whether all of its packed weights are on the disk. */
  settled: boolean
}

export class DiskOffload {
  readonly #device: Device
  readonly #folder: string | undefined
  readonly #units: Unit[] = []
  readonly #files = new Map<string, SafetensorsFile>()
  /** Written by a unit's run when it is done; the next but one begins to read after it. */
  readonly #turns: Tensor[] = []
  #turn = 0

  /** `folder`: where weights go that the checkpoint does not have as they are needed. */
  constructor(model: Module, layout: Layout, folder: string | undefined) {
    this.#device = layout.main
    this.#folder = folder
    this.#collect(model, '', layout)
    if (this.#units.length === 0) return
    this.#turns = [0, 1].map(() => keep(Tensor.zeros([1], 'uint8', this.#device)))
  }

  get isEmpty(): boolean {
    return this.#units.length === 0
  }

  /** The outermost modules on the disk that run as a whole. */
  #collect(module: Module, path: string, layout: Layout): void {
    const on = (each: Module) => layout.place(each) ?? DISK
    if (module.dispatch === 'block' && layout.place(module) === DISK) {
      const unit: Unit = { path, module, packed: [], plain: new Map(), settled: false }
      for (const [at, each] of module.namedModules(path)) {
        if (on(each) !== DISK || each.dispatch === 'anywhere') continue
        const weights = [...each.ownPacked()]
        for (const weight of weights) unit.packed.push({ path: at, weight, parts: new Map(), loaded: false })
        for (const [name, parameter] of each.ownParameters()) {
          if (!parameter.persistent || parameter.nbytes < SMALL) continue
          if (weights.some((weight) => weight.accepts(name))) continue
          const own = at === '' ? name : `${at}.${name}`
          unit.plain.set(own, { path: own, parameter, finite: new FiniteCheck() })
        }
      }
      this.#units.push(unit)
      return
    }
    for (const [name, child] of module.namedChildren()) {
      this.#collect(child, path === '' ? name : `${path}.${name}`, layout)
    }
  }

  /** Leaves out parameters that a module in memory has too. */
  keepTied(model: Module): void {
    const units = new Set(this.#units.flatMap(({ module }) => module.modules()))
    const resident = new Set<object>()
    for (const module of model.modules()) {
      if (units.has(module)) continue
      for (const [, parameter] of module.ownParameters()) resident.add(parameter.identity)
    }
    for (const { plain } of this.#units) {
      for (const [path, { parameter }] of plain) if (resident.has(parameter.identity)) plain.delete(path)
    }
  }

  /** ERR_HALFBYTE_VALUE when something would have to be written and there is no folder for it. */
  checkFolder(prequantized: boolean): void {
    const quantized = this.#units.filter(({ packed }) => packed.length > 0)
    if (prequantized || quantized.length === 0 || this.#folder !== undefined) return
    throw new HalfbyteError(
      'ERR_HALFBYTE_VALUE',
      `deviceMap: ${quantized[0]!.path || 'the model'} is on the disk and quantised while it is loaded; ` +
        'say with offloadFolder where its weights may be written, or load a checkpoint that is quantised already',
    )
  }

  /** A tensor of the checkpoint has been loaded; what is complete goes to the disk. */
  async loaded(path: string, info: TensorInfo): Promise<void> {
    for (const unit of this.#units) {
      if (unit.path !== '' && !path.startsWith(`${unit.path}.`)) continue
      const plain = unit.plain.get(path)
      if (plain) this.#offloadPlain(plain, info)
      for (const packed of unit.packed) {
        if (packed.loaded) continue
        const name = packed.path === '' ? path : path.slice(packed.path.length + 1)
        const isOwn = packed.path === '' || path.startsWith(`${packed.path}.`)
        if (isOwn && packed.weight.accepts(name)) packed.parts.set(name, info)
        packed.loaded = packed.weight.missing().length === 0
      }
      if (!unit.settled && unit.packed.length > 0 && unit.packed.every(({ loaded }) => loaded)) {
        await this.#settle(unit)
      }
    }
  }

  #offloadPlain({ parameter, finite }: Plain, info: TensorInfo): void {
    const value = parameter.value
    const { dtype, isContiguous } = value
    if (value.shape.length !== info.shape.length || value.shape.some((n, i) => n !== info.shape[i])) return
    tidy(() => finite.begin(isContiguous ? value : value.transpose(-2, -1)))
    const file = this.#open(info.file)
    const wanted = () => parameter.dtype ?? dtype
    const read = (on: Device, after?: Tensor) => {
      const stored = file.tensor(info.name, on, after)
      const converted = stored.to(wanted())
      if (converted !== stored) stored.dispose()
      return converted
    }
    const bringIn = () =>
      isContiguous ? read(this.#device, this.#after()) : this.#turned(file, info, wanted())
    parameter.offload({ bringIn, read })
  }

  /** Matrices that lie in memory the other way round than in the file, piece by piece. */
  #turned(file: SafetensorsFile, { name, shape, begin, end }: TensorInfo, dtype: DType): Tensor {
    const rows = shape[0]!
    const step = Math.max(1, Math.floor((PIECE * rows) / (end - begin)))
    return tidy(() => {
      const memory = Tensor.empty([...shape.slice(0, -2), shape.at(-1)!, shape.at(-2)!], dtype, this.#device)
      const whole = memory.transpose(-2, -1)
      let [before, last]: (Tensor | undefined)[] = []
      for (let at = 0; at < rows; at += step) {
        const to = Math.min(rows, at + step)
        // it is read when the one before the last has gone where it belongs
        const piece = file.rows(name, at, to, this.#device, before ?? this.#after())
        whole.slice(0, at, to).copyFrom(piece)
        before?.dispose()
        ;[before, last] = [last, piece]
      }
      return whole
    })
  }

  /** Packed weights are left where the checkpoint has them packed, else written. */
  async #settle(unit: Unit): Promise<void> {
    unit.settled = true
    const made = unit.packed.filter(({ parts }) => parts.size <= 1)
    let written: SafetensorsFile | undefined
    if (made.length > 0) {
      const entries = new Map<string, StateEntry>()
      for (const { path, weight } of made) {
        for (const [name, entry] of await weight.entries())
          entries.set(path === '' ? name : `${path}.${name}`, entry)
      }
      written = await this.#write(unit.path, entries)
    }
    for (const { path, weight, parts } of unit.packed) {
      const own = (name: string) => (path === '' ? name : `${path}.${name}`)
      // opened now, so that it is these bytes that are read, whatever takes the file's place
      const files = new Map([...parts].map(([name, info]) => [name, this.#open(info.file)]))
      weight.offload((name, on) => {
        const [device, after] = on ? [on, undefined] : [this.#device, this.#after()]
        return parts.size <= 1
          ? written!.tensor(own(name), device, after)
          : files.get(name)!.tensor(parts.get(name)!.name, device, after)
      })
    }
  }

  /** Writes a file that is there as long as it is open: its name goes at once, so that nothing is left behind. */
  async #write(path: string, entries: ReadonlyMap<string, StateEntry>): Promise<SafetensorsFile> {
    const folder = this.#folder!
    await makeFolder(folder)
    const name = join(folder, temporaryName(`${path || 'model'}.safetensors`))
    try {
      await writeEntries(name, entries)
      const file = SafetensorsFile.open(name)
      this.#files.set(name, file)
      return file
    } finally {
      rmSync(name, { force: true })
    }
  }

  #open(path: string): SafetensorsFile {
    let file = this.#files.get(path)
    if (!file) this.#files.set(path, (file = SafetensorsFile.open(path)))
    return file
  }

  #after(): Tensor | undefined {
    return this.#turns[this.#turn]
  }

  /** Names of parameters whose values were not finite, with how many. */
  async nonfinite(): Promise<string[]> {
    const counts = this.#units.flatMap(({ plain }) =>
      [...plain.values()].map(async ({ path, finite }) => {
        const count = await finite.count()
        return count > 0 ? [`${path} (${count})`] : []
      }),
    )
    return (await Promise.all(counts)).flat()
  }

  /** What is to be done around the forward() of a module; undefined for one that is in memory. */
  weightsOf(module: Module): ((forward: () => unknown) => unknown) | undefined {
    const unit = this.#units.find((each) => each.module === module)
    if (!unit) return undefined
    const weights = [
      ...unit.packed.map(({ weight }) => weight),
      ...[...unit.plain.values()].map((p) => p.parameter),
    ]
    return (forward) => {
      const turn = this.#turns[this.#turn]!
      try {
        for (const weight of weights) weight.bringIn()
        return forward()
      } finally {
        for (const weight of weights) weight.release()
        tidy(() => fillInto(turn, 0))
        this.#turn = (this.#turn + 1) % this.#turns.length
      }
    }
  }

  dispose(): void {
    for (const file of this.#files.values()) file.close()
    for (const turn of this.#turns) turn.dispose()
    this.#files.clear()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }
}
