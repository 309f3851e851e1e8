/**
 * Modules on the disk. What is large of them is in memory only while they run: it is read from the checkpoint where the
 * checkpoint has it as it is needed, else from a file that is written while loading (weights that were quantised on the
 * way in, or converted). While one module runs the next one is read; a third has to wait, so two are in memory at most.
 */
import { randomUUID } from 'node:crypto'
import { rmSync } from 'node:fs'
import { join } from 'node:path'
import { HalfbyteError } from '../errors.js'
import { FiniteCheck } from '../nn/finite.js'
import type { Module } from '../nn/module.js'
import type { PackedWeight } from '../nn/packed.js'
import type { Parameter } from '../nn/parameter.js'
import type { Device } from '../tensor/device.js'
import { fillInto } from '../tensor/ops/layout.js'
import { Tensor } from '../tensor/tensor.js'
import { keep, tidy } from '../tensor/tidy.js'
import type { Layout } from './dispatch.js'
import type { TensorInfo } from './header.js'
import { DISK } from './max_memory.js'
import { SafetensorsFile } from './safetensors.js'
import { makeFolder, writeSafetensors } from './write.js'

/** Tensors of fewer bytes stay in memory: a read of its own costs more than they take. */
const SMALL = 64 << 10

interface Packed {
  path: string
  weight: PackedWeight
  /** Its tensors in the checkpoint, by own name, as they were loaded. */
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
      const plain = unit.plain.get(path)
      if (plain) this.#offloadPlain(plain, info)
      for (const packed of unit.packed) {
        const name = packed.path === '' ? path : path.slice(packed.path.length + 1)
        if (!(packed.path === '' || path.startsWith(`${packed.path}.`)) || !packed.weight.accepts(name))
          continue
        packed.parts.set(name, info)
        packed.loaded = packed.weight.missing().length === 0
      }
      if (!unit.settled && unit.packed.length > 0 && unit.packed.every(({ loaded }) => loaded)) {
        await this.#settle(unit)
      }
    }
  }

  #offloadPlain({ parameter, finite }: Plain, info: TensorInfo): void {
    const value = parameter.value
    const { dtype } = value
    // what a module lays out in a way of its own is not what the checkpoint has
    if (!value.isContiguous || value.shape.some((n, i) => n !== info.shape[i])) return
    finite.begin(value)
    const file = this.#open(info.file)
    parameter.offload(() => {
      const stored = file.tensor(info.name, this.#device, this.#after())
      const converted = stored.to(parameter.dtype ?? dtype)
      if (converted !== stored) stored.dispose()
      return converted
    })
  }

  /** Packed weights are left where the checkpoint has them packed, else written. */
  async #settle(unit: Unit): Promise<void> {
    unit.settled = true
    const made = unit.packed.filter(({ parts }) => parts.size === 1)
    let written: SafetensorsFile | undefined
    if (made.length > 0) {
      const tensors = new Map<string, Tensor>()
      for (const { path, weight } of made) {
        for (const [name, tensor] of await weight.entries())
          tensors.set(path === '' ? name : `${path}.${name}`, tensor)
      }
      try {
        written = await this.#write(unit.path, tensors)
      } finally {
        for (const tensor of tensors.values()) tensor.dispose()
      }
    }
    for (const { path, weight, parts } of unit.packed) {
      weight.offload((name) => {
        const info = parts.size === 1 ? undefined : parts.get(name)
        const file = info ? this.#open(info.file) : written!
        return file.tensor(
          info?.name ?? (path === '' ? name : `${path}.${name}`),
          this.#device,
          this.#after(),
        )
      })
    }
  }

  /** Writes a file that is there as long as it is open: its name goes at once, so that nothing is left behind. */
  async #write(path: string, tensors: ReadonlyMap<string, Tensor>): Promise<SafetensorsFile> {
    const folder = this.#folder!
    await makeFolder(folder)
    const name = join(folder, `${path || 'model'}.${randomUUID()}.safetensors`)
    try {
      await writeSafetensors(name, tensors)
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
