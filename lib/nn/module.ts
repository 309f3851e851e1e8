/**
 * Module: a tree of layers with named parameters.
 *
 * Registration   what is assigned to a property is part of the module: a Module (or an array of them) is a child, a
 *                Parameter or a Tensor a parameter, a Buffer a buffer. The property's name is the name in paths and
 *                state dicts, unless _names has another. Properties that begin with '_' and #private ones are left out.
 * Ties           one Parameter or one Tensor in two places is one: it is counted, moved and freed once, and stays tied.
 * Loading        a model built on 'meta' (see onMeta) is filled by a loader:
 *                  await model.loadParameter('model.layers.0.mlp.up_proj.weight', tensor)   takes the tensor over
 *                  model.missingParameters()                                                what is still to come
 *                  await model.checkFinite()                                                NaN and inf, by name
 *                Quantised layers quantise what arrives in a float dtype, at once, and accept the parts of a weight
 *                that is quantised already ('weight', 'weight.absmax', 'weight.quant_state.bitsandbytes__nf4', ...)
 *                in any order. Only what has to be read on the host is waited for.
 * For authors    a layer with tensors that are not plain parameters overrides the methods marked "own": they speak of
 *                this module alone, never of its children.
 */
import { inspect } from 'node:util'
import { HalfbyteError } from '../errors.js'
import type { Device } from '../tensor/device.js'
import type { MoveTarget } from '../tensor/target.js'
import { Tensor } from '../tensor/tensor.js'
import { checkFinite } from './finite.js'
import { refuseSpread, refuseSpreadChildren } from './hooks.js'
import { acceptsParameter, loadParameter, missingParameters } from './loading.js'
import type { PackedWeight } from './packed.js'
import { moveModule } from './moving.js'
import { Parameter, TensorProperty } from './parameter.js'
import { join, namedPlaces, namePaths, resolve } from './paths.js'
import {
  loadStateDict,
  ownProblems,
  readEntries,
  stateEntries,
  type LoadStateDictResult,
  type OwnProblems,
  type StateEntry,
} from './state_dict.js'
import { treeText } from './tree.js'

export abstract class Module implements Disposable {
  /** Set by train() and eval(). */
  training = false
  /** What properties are called in paths and state dicts, where that is not their own name: { o_proj: 'c_proj' }. */
  protected _names: Readonly<Record<string, string>> = {}

  /** The layer's computation. Queues work and returns, like every op. */
  abstract forward(...inputs: never[]): unknown

  /**
   * What the module is when a device map spreads its model. A 'block' computes on one device: children elsewhere get
   * their inputs moved and their results brought back. A 'pipeline' hands tensors on from child to child, wherever they
   * lie. 'anywhere': it follows its inputs.
   */
  get dispatch(): 'block' | 'pipeline' | 'anywhere' {
    return 'block'
  }

  // -- the tree

  /** Children by name, in the order of assignment; those in an array are named like 'layers.0'. */
  *namedChildren(): IterableIterator<[string, Module]> {
    for (const [name, value] of this.#properties()) {
      if (value instanceof Module) yield [name, value]
      else if (Array.isArray(value)) {
        for (const [i, item] of value.entries()) if (item instanceof Module) yield [`${name}.${i}`, item]
      }
    }
  }

  /** The child that a dotted path leads to or through. */
  childOnPath(path: string): [string, Module] | undefined {
    for (const entry of this.namedChildren()) {
      if (path === entry[0] || path.startsWith(`${entry[0]}.`)) return entry
    }
    return undefined
  }

  /** Puts another module in the place of a child; not in a model that a device map has spread: ERR_HALFBYTE_USAGE. */
  setChild(name: string, module: Module): void {
    refuseSpreadChildren(this, 'setChild')
    const dot = name.lastIndexOf('.')
    for (const [own, value, key] of this.#properties()) {
      if (Array.isArray(value) && own === name.slice(0, dot) && Object.hasOwn(value, name.slice(dot + 1))) {
        ;(value as Module[])[Number(name.slice(dot + 1))] = module
        return
      }
      if (own === name && !Array.isArray(value)) {
        ;(this as unknown as Record<string, unknown>)[key] = module
        return
      }
    }
    throw new HalfbyteError('ERR_HALFBYTE_VALUE', `setChild: ${this.constructor.name} has no child '${name}'`)
  }

  children(): Module[] {
    return [...this.namedChildren()].map(([, child]) => child)
  }

  /** This module ('') and all below it, parents first. A module in two places comes once, by its first name. */
  *namedModules(prefix = '', seen = new Set<Module>()): IterableIterator<[string, Module]> {
    if (seen.has(this)) return
    seen.add(this)
    yield [prefix, this]
    for (const [name, child] of this.namedChildren()) yield* child.namedModules(join(prefix, name), seen)
  }

  modules(): Module[] {
    return [...this.namedModules()].map(([, module]) => module)
  }

  /** The module at a dotted path; '' is this one. */
  getSubmodule(path: string): Module {
    const { module, rest } = resolve(this, path)
    if (rest === '') return module
    const names = [...module.namedChildren()].map(([name]) => name)
    throw new HalfbyteError(
      'ERR_HALFBYTE_VALUE',
      `getSubmodule: there is no module '${path}': ${module.constructor.name} has ` +
        (names.length ? names.join(', ') : 'no children'),
    )
  }

  /** Replaces the module at a dotted path. The old one is the caller's again. */
  setSubmodule(path: string, module: Module): void {
    refuseSpread(
      this,
      'setSubmodule',
      'load it again without one, replace the module, and then dispatchModel()',
    )
    this.getSubmodule(path)
    const { parent, name } = resolve(this, path)
    if (!parent) throw new HalfbyteError('ERR_HALFBYTE_VALUE', "setSubmodule: '' is the model itself")
    parent.setChild(name, module)
  }

  /** Calls `fn` on every module, children before their parents. */
  apply(fn: (module: Module) => void): this {
    for (const module of this.modules().reverse()) fn(module)
    return this
  }

  train(mode = true): this {
    for (const module of this.modules()) module.training = mode
    return this
  }

  eval(): this {
    return this.train(false)
  }

  /** Whether backward() computes gradients of the parameters. A quantised one has none: ERR_HALFBYTE_DTYPE names it. */
  requiresGrad_(wanted = true): this {
    this.namePaths()
    const parameters = this.parameters()
    // refused before anything is changed
    for (const parameter of wanted ? parameters : []) parameter.checkGradient()
    for (const parameter of parameters) parameter.requiresGrad = wanted
    return this
  }

  /** Frees the gradients of all parameters. */
  zeroGrad(): void {
    for (const parameter of this.parameters()) parameter.tensor?.zeroGrad()
  }

  // -- parameters

  /** Parameters by full name, tied ones once unless removeDuplicate is false. */
  *namedParameters(options: { removeDuplicate?: boolean } = {}): IterableIterator<[string, Parameter]> {
    yield* namedPlaces(this, 'parameter', options.removeDuplicate ?? true)
  }

  *namedBuffers(options: { removeDuplicate?: boolean } = {}): IterableIterator<[string, Parameter]> {
    yield* namedPlaces(this, 'buffer', options.removeDuplicate ?? true)
  }

  parameters(): Parameter[] {
    return [...this.namedParameters()].map(([, parameter]) => parameter)
  }

  /** Number of parameters' elements, tied ones once, packed ones by what they stand for. */
  numParameters(): number {
    return this.parameters().reduce((sum, parameter) => sum + parameter.numel, 0)
  }

  /** The device of the first parameter that has one. */
  get device(): Device | undefined {
    return this.parameters().find((parameter) => parameter.device)?.device
  }

  /** Tells every parameter its full name, for messages. */
  namePaths(): this {
    namePaths(this)
    return this
  }

  /** Own parameters and buffers, by name. */
  *ownParameters(): IterableIterator<[string, Parameter]> {
    for (const [name, value, key] of this.#properties()) {
      if (value instanceof Parameter) yield [name, value]
      else if (value instanceof Tensor) {
        yield [name, new TensorProperty(this as unknown as Record<string, unknown>, key, value)]
      }
    }
  }

  /** Own weights in packed form. Their codes lie in a parameter, which is listed as one too. */
  *ownPacked(): IterableIterator<PackedWeight> {}

  /** Own tensors besides parameters and buffers that packed weights need (absmax, SCB, ...), by state-dict name. */
  *ownStatistics(): IterableIterator<[string, Tensor]> {
    for (const packed of this.ownPacked()) yield* packed.statistics()
  }

  // -- state

  /**
   * Every tensor of the model by its name in checkpoints. The tensors share the model's memory (what had to be made
   * for the occasion aside); disposing them leaves the model as it is. Tied ones share a storageId. What lies on the disk
   * is read, all of it, into main memory: stateEntries() and savePretrained() read one tensor after the other.
   */
  async stateDict(): Promise<Map<string, Tensor>> {
    return readEntries(await this.stateEntries())
  }

  /** The state dict before it is read: the dtype and shape of each tensor, and read(), which gives it to the caller. */
  async stateEntries(): Promise<Map<string, StateEntry>> {
    return stateEntries(this)
  }

  /**
   * Takes the values of `state`. All complaints come in one ERR_HALFBYTE_STATE_DICT, before anything is changed.
   * strict = false forgives missing and unexpected names, and returns them. Where dtype and device agree the memory is
   * shared with `state`, not copied.
   */
  async loadStateDict(
    state: ReadonlyMap<string, Tensor>,
    options: { strict?: boolean } = {},
  ): Promise<LoadStateDictResult> {
    return loadStateDict(this, state, options.strict ?? true)
  }

  /** Own parameters and buffers that the state dict lists as they are. */
  #plain(): Map<string, Parameter> {
    const packed = [...this.ownPacked()]
    return new Map(
      [...this.ownParameters()].filter(
        ([name, parameter]) => parameter.persistent && !packed.some((weight) => weight.accepts(name)),
      ),
    )
  }

  #packedFor(name: string): PackedWeight | undefined {
    return [...this.ownPacked()].find((weight) => weight.accepts(name))
  }

  /** Own entries of the state dict: weights, other parameters, and the statistics of packed weights. */
  async ownEntries(): Promise<[string, StateEntry][]> {
    const packed: [string, StateEntry][][] = []
    for (const weight of this.ownPacked()) packed.push(await weight.entries())
    const plain = [...this.#plain()].map(([name, parameter]): [string, StateEntry] => [
      name,
      parameter.stateEntry(),
    ])
    return [
      ...packed.flatMap((entries) => entries.slice(0, 1)),
      ...plain,
      ...packed.flatMap((entries) => entries.slice(1)),
    ]
  }

  /** What is wrong with `own`, the part of a state dict that is this module's. */
  ownStateProblems(own: ReadonlyMap<string, Tensor>): OwnProblems {
    const rest = new Map([...own].filter(([name]) => !this.#packedFor(name)))
    const problems = ownProblems(this.#plain(), rest)
    for (const weight of this.ownPacked()) {
      const { missing, wrong } = weight.problems(new Map([...own].filter(([name]) => weight.accepts(name))))
      problems.missing.push(...missing)
      problems.wrong.push(...wrong)
    }
    return problems
  }

  /** Whether a state-dict name is one of this module's own. */
  ownAccepts(name: string): boolean {
    return this.#packedFor(name) !== undefined || this.#plain().has(name)
  }

  /** Own names that are still to be loaded. */
  ownMissing(): string[] {
    const plain = [...this.#plain()].filter(([, parameter]) => !parameter.isLoaded).map(([name]) => name)
    return [...this.ownPacked()].flatMap((weight) => weight.missing()).concat(plain)
  }

  /** Takes over one tensor by its own name, which ownAccepts(). */
  async ownLoad(name: string, tensor: Tensor): Promise<void> {
    const packed = this.#packedFor(name)
    if (packed) await packed.load(name, tensor)
    else this.#plain().get(name)!.load(tensor)
  }

  /** Whether the model has a place for a state-dict name. */
  acceptsParameter(path: string): boolean {
    return acceptsParameter(this, path)
  }

  /**
   * Takes over one tensor by its full name. ERR_HALFBYTE_STATE_DICT for an unknown name or a wrong shape or dtype,
   * ERR_HALFBYTE_USAGE for what lies on the disk.
   */
  async loadParameter(path: string, tensor: Tensor): Promise<void> {
    await loadParameter(this, path, tensor)
  }

  /** Names of what has still to be loaded; one of several tied names, as any of them will do. */
  missingParameters(): string[] {
    return missingParameters(this)
  }

  /**
   * Waits until every weight that was quantised here is known to hold no NaN and no infinity; ERR_HALFBYTE_VALUE names
   * the modules whose weights do. Layers that are known to be bad also refuse to run.
   */
  async checkFinite(): Promise<void> {
    await checkFinite(this)
  }

  /** Number of NaN and infinite elements found in what was quantised here. */
  async ownNonfinite(): Promise<number> {
    const counts = await Promise.all([...this.ownPacked()].map((weight) => weight.nonfinite()))
    return counts.reduce((sum, count) => sum + count, 0)
  }

  // -- moving

  /**
   * Moves parameters and buffers to a device, casts float parameters to a dtype, or both. A model with quantised
   * layers moves, but is not cast: ERR_HALFBYTE_DTYPE says why, and nothing is changed.
   */
  to(target: MoveTarget): this {
    moveModule(this, target)
    return this
  }

  /** Moves own tensors that are neither parameters nor buffers. */
  ownMove(device: Device): void {
    for (const weight of this.ownPacked()) weight.move(device)
  }

  /** Why the dtype of this module cannot be changed, or undefined when it can. */
  ownCastRefusal(): string | undefined {
    return [...this.ownPacked()].map((weight) => weight.castRefusal()).find((reason) => reason !== undefined)
  }

  // -- life

  readonly #adopted: Disposable[] = []

  /** @internal Something that is of use to the model only, and goes with it. */
  adopt(resource: Disposable): void {
    this.#adopted.push(resource)
  }

  /** Frees every tensor of the model. */
  dispose(): void {
    for (const module of this.modules()) module.ownDispose()
    for (const resource of this.#adopted.splice(0)) resource[Symbol.dispose]()
  }

  /** Frees own tensors. */
  ownDispose(): void {
    for (const [, parameter] of this.ownParameters()) parameter.dispose()
    for (const weight of this.ownPacked()) weight.dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }

  // -- text

  /** The tree of modules, as Python prints it. */
  toString(): string {
    return treeText(this)
  }

  [inspect.custom](): string {
    return this.toString()
  }

  // -- walking

  /** Name, value and key of each property that may be part of the module. */
  *#properties(): IterableIterator<[string, unknown, string]> {
    for (const [key, value] of Object.entries(this)) {
      if (!key.startsWith('_')) yield [this._names[key] ?? key, value, key]
    }
  }
}
