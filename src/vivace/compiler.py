"""The driver: import -> optimize -> lower -> generate -> link -> engine, on one screen."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vivace import __version__
from vivace.base.cache import default_cache
from vivace.base.errors import EngineError, InputError, ModelError, ProviderError, UnsupportedError, VivaceError
from vivace.base.events import warn
from vivace.base.knobs import knobs
from vivace.base.machine import ISAS, Isa, host, isa, missing_flags
from vivace.base.specs import TensorSpec

if TYPE_CHECKING:
    import numpy as np

    from vivace.graph.graph import Graph, Node, Value
    from vivace.lower.choices import Choices
    from vivace.lower.image import ForeignEntry, Image
    from vivace.lower.lowering import Packed
    from vivace.lower.plan import Plan
    from vivace.measure.compare import Tolerance
    from vivace.runtime.engine import Engine, ForeignRunner, MakeForeign, Placement
    from vivace.runtime.partitioned import PartitionedEngine
    from vivace.targets.cpu.codegen import Known
    from vivace.tuning import Tune

PRECISIONS = ("f32", "bf16", "f16", "auto")
PROVIDERS = ("native", "onnxruntime", "openvino")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Options:
    """How a graph becomes an engine: what `compile` was asked for, with all defaults filled in."""

    threads: int
    target: Isa
    providers: tuple[str, ...] = ("native", "onnxruntime")
    precision: str = "f32"
    level: int | str = 99
    disable: tuple[str, ...] = ()
    cache: bool = True
    progress: Progress | None = None
    tune: Tune | None = None

    @property
    def without(self) -> frozenset[str]:
        """Choices of the lowering that are switched off."""
        from vivace.lower.lowering import OPTIONS

        return frozenset(self.disable) & OPTIONS.keys()

    @property
    def kept(self) -> list[str]:
        """What else is disabled: passes and rules of the optimizer."""
        return [name for name in self.disable if name not in self.without]

    @property
    def facts(self) -> dict[str, object]:
        """What an engine keeps, so that it can be made again in the same way on another CPU."""
        return {"level": self.level, "disable": list(self.disable)}


def compile(
    source: object,
    *,
    precision: str = "f32",
    threads: int | None = None,
    providers: Sequence[str] | str = ("native", "onnxruntime"),
    target: str = "host",
    tune: str = "off",
    tune_budget: float | None = None,
    timing_cache: str | Path | None = None,
    cache: bool = True,
    shapes: Mapping[str, Sequence[int]] | None = None,
    level: int | str = 99,
    disable: Sequence[str] = (),
    progress: Progress | None = None,
    calibration: Mapping[str, np.ndarray] | Sequence[Mapping[str, np.ndarray]] = (),
    max_drop: float | None = None,
    metric: str = "relative",
) -> Engine | PartitionedEngine:
    """Compile a model for this machine.

    `source`: a path, bytes, an onnx.ModelProto, or a graph. `shapes` fixes the dims of named inputs; others stay
    symbolic. `target` is `host` or an instruction set (`sse`, `avx2`, `avx512`).
    `providers` lists who may compute, the first choice first: with `native` alone a node that we have no kernel for is
    an error; without `native` the first provider runs the whole model; `auto` measures all, whole and for parts of the
    model, and keeps the fastest (5 to 30 s the first time, then from the cache).
    `disable` names passes and rules of the optimizer (docs/rules.md) to leave out, and choices of the lowering
    (`winograd`, `epilogues`, `trees`, `placement`, `in_place`): `benchmarks/ablations.py` shows what each brings.
    `tune` measures ways to make the kernels: `fast` for seconds, `full` for minutes, or `tune_budget` s; it keeps them
    here and in `timing_cache` (see `vivace timings`). `off` measures nothing, and takes the choices of a `timing_cache`
    where one is given. `progress(stage, done, total)` tells how far it is.
    `precision` is `f32`, `bf16` or `f16`: values between kernels and weights of products are stored in that type, sums
    stay in f32 (see `vivace.lower.precision`). Where the CPU has no products of the type with f32 sums it would not pay
    (no x86 CPU that we make code for has those of f16), and f32 is used: `engine.stats["precision_note"]` says so. With
    inputs in `calibration` the error against f32 is measured on them, `engine.stats["precision_error"]`.
    `auto` chooses by layer: a narrow format is kept where it measures faster and the outputs stay within `max_drop` of
    those in f32 by `metric` (relative, max_absolute, top1, cosine; `vivace.formats`), on the inputs in `calibration`,
    or else on seeded ones. `engine.stats["layers"]` tells each layer's format, its error alone, and the time saved.
    Raises: ModelError, UnsupportedError (a node has no provider), InputError (a bad option).
    """
    if precision not in PRECISIONS:
        raise UnsupportedError(f"precision {precision!r} is not available", expected=", ".join(PRECISIONS))
    from vivace.tuning import tune_of

    names = tuple(providers.split(",")) if isinstance(providers, str) else tuple(providers)
    for name in names:
        if name not in (*PROVIDERS, "auto"):
            raise InputError(f"unknown provider {name!r}", where="providers", expected=", ".join((*PROVIDERS, "auto")))
    options = Options(
        threads_for(threads), choose_isa(target), names, precision, level, tuple(disable), cache, progress,
        tune_of(tune, tune_budget, timing_cache, cache),
    )  # fmt: skip
    samples = [calibration] if isinstance(calibration, Mapping) else list(calibration)
    _refuse_unused(options, bool(samples))
    job = Job(source, shapes, options)
    if names == ("auto",):
        from vivace.choice import fastest

        return fastest(replace(job, options=replace(options, providers=("native", "onnxruntime"))), shapes, cache)
    if "native" not in names:
        return job.whole(names[0], "asked for")
    if precision == "auto":
        return _automatic(job, samples, max_drop, metric)
    engine = job.native()
    if samples and engine.facts.get("precision", "f32") != "f32":
        from vivace.formats import measure_error

        f32 = replace(job, options=replace(options, precision="f32")).native()
        engine.facts["precision_error"] = measure_error(engine, f32, samples)
    return engine


def _refuse_unused(options: Options, has_samples: bool) -> None:
    """Raises: InputError for options of which one would have no effect beside another."""
    whole, precision = options.providers[:1] if "native" not in options.providers else (), options.precision
    if precision == "auto" and whole == ("auto",):
        raise InputError("formats and providers cannot be chosen by measurement in one", where="precision")
    if precision == "auto" and options.tune is not None:
        raise InputError("formats and kernels cannot be chosen by measurement in one", where="tune", expected="off")
    if options.tune is not None and whole not in ((), ("auto",)):
        raise InputError(f"{whole[0]} runs the whole model: its kernels are not tuned", where="tune", expected="off")
    if has_samples and whole == ("auto",):
        raise InputError("no error is measured with providers='auto'", where="calibration", expected="none")
    if precision != "f32" and whole not in ((), ("auto",)):
        raise InputError(f"{whole[0]} runs the whole model in f32", where="precision", expected="f32")


@dataclass(frozen=True, slots=True)
class Job:
    """A model and how to compile it."""

    source: object
    shapes: Mapping[str, Sequence[int]] | None
    options: Options

    @property
    def key(self) -> str:
        """All that the speed of an engine depends on, besides the model and the machine."""
        o = self.options
        return repr((__version__, o.threads, o.target.name, o.precision, o.level, o.disable, o.tune and o.tune.effort))

    @property
    def tolerance(self) -> Tolerance:
        """How near another provider's answers, in f32, must be to ours."""
        from vivace.measure.compare import LEAST_SNR_DB, Tolerance

        return Tolerance(least_snr_db=None if self.options.precision == "f32" else LEAST_SNR_DB)

    def portable(self) -> bytes:
        return portable_model(self.source, self.shapes)

    def native(self) -> Engine | PartitionedEngine:
        """The engine of our own code, with parts in ONNX Runtime where sizes only show when the model runs."""
        from vivace.graph.sizes import late_nodes
        from vivace.optimize.islands import float_islands

        options = self.options
        started = time.perf_counter()
        tell = options.progress or (lambda stage, done, total: None)
        tell("import", 0, 1)
        graph = load_graph(self.source, self.shapes)
        if "onnxruntime" in options.providers and late_nodes(graph):
            try:
                return self.pieces(self.portable_graph(graph), {}, {})
            except (UnsupportedError, ProviderError) as e:  # such as an operator of an opset that is not exported
                return self._in_f32(self.whole("onnxruntime", str(e)))
        tell("optimize", 0, 1)
        plan, image, graph = build(graph, options)
        image.facts["compile_seconds"] = time.perf_counter() - started
        return _engine(plan, image, options, placements(image, float_islands(graph)), self.portable)

    def _in_f32(self, engine: PartitionedEngine) -> PartitionedEngine:
        """The engine of another provider in the place of ours, which says so where a precision was asked for."""
        if self.options.precision != "f32":
            note = f"onnxruntime runs the whole model: computed in f32, not {self.options.precision}"
            warn("precision", note)
            engine.facts.update(precision="f32", precision_note=note)
        return engine

    def portable_graph(self, graph: Graph | None = None) -> Graph:
        """The graph rewritten as far as any provider can still run it: what is cut into pieces."""
        from vivace.optimize.pipeline import Level, level_of

        level = min(level_of(self.options.level), Level.EXTENDED)
        graph = load_graph(self.source, self.shapes) if graph is None else graph
        return optimize_for_native(graph, level, self.options.kept)

    def pieces(self, graph: Graph, whose: Mapping[Node, str], reasons: Mapping[Node, str]) -> PartitionedEngine:
        """An engine of parts: each node in the provider that `whose` names, others native, and nodes whose sizes only
        show when they run in ONNX Runtime in any case. `reasons` say why."""
        from vivace.graph.cut import cut
        from vivace.graph.sizes import late_nodes
        from vivace.lower.image import Part
        from vivace.onnx.exporter import export
        from vivace.runtime.engine import Placement
        from vivace.runtime.partitioned import PartitionedEngine, load_part
        from vivace.runtime.saved import Program

        started = time.perf_counter()
        late = dict.fromkeys(late_nodes(graph), "its sizes only show when it runs")
        whose = {**whose, **{n: "onnxruntime" for n in late if whose.get(n, "native") == "native"}}
        because = {name: text for n, text in {**reasons, **late}.items() for name in onnx_names(n)}
        parts: list[Part] = []
        runners: list[Any] = []
        placement: list[Placement] = []
        facts: dict[str, Any] = {"precision": self.options.precision, **self.options.facts}
        for k, piece in enumerate(cut(graph, whose)):
            g = piece.graph
            if piece.provider == "native":
                plan, image, _ = build(g, self.options)
                facts |= {name: image.facts[name] for name in ("precision", "precision_note") if name in image.facts}
                parts.append(Part("native", _specs(g.inputs), _specs(g.outputs), image))
                records = placements(image, because)
                runners.append(_engine(plan, image, self.options, records, self.portable))
                placement += [replace(p, kernel=f"{k}/{p.kernel}") for p in records]
                continue
            refuse_odd_types(piece.provider, (*g.inputs, *g.outputs))
            model = export(g).SerializeToString()
            parts.append(Part(piece.provider, _specs(g.inputs), _specs(g.outputs), model=model))
            runners.append(load_part(parts[-1], self.options.threads, self.portable, spin=False))
            names = {name: n.op.name for n in g.nodes for name in onnx_names(n)}
            place = f"{k}:{piece.provider}"
            placement += [Placement(o, op, place, piece.provider, because.get(o, "")) for o, op in names.items()]
        facts["compile_seconds"] = time.perf_counter() - started
        program = Program(
            tuple(parts), _specs(graph.inputs), _specs(graph.outputs), [p.fields for p in placement], facts
        )
        return PartitionedEngine(program, runners, self.options.threads, self.portable)

    def whole(self, provider: str, reason: str) -> PartitionedEngine:
        """The whole model in another provider. Raises: ProviderError where it refuses the model."""
        from vivace.lower.image import Part
        from vivace.providers.provider import LoadOptions, find
        from vivace.runtime.partitioned import PartitionedEngine
        from vivace.runtime.saved import Program

        model: Any = self.source if isinstance(self.source, (str, bytes, Path)) else self.portable()
        fixed = {k: tuple(v) for k, v in (self.shapes or {}).items()}
        session = find(provider).load(model, LoadOptions(threads=self.options.threads, shapes=fixed))
        part = Part(provider, session.inputs, session.outputs)
        facts: dict[str, Any] = {"provider": provider, "reason": reason}
        program = Program((part,), part.inputs, part.outputs, [["*", "*", "the whole model", provider, reason]], facts)
        return PartitionedEngine(program, [session], self.options.threads, self.portable)


def _specs(values: Sequence[Value]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(v.name, v.dtype, v.shape) for v in values)


def _engine(
    plan: Plan, image: Image, options: Options, placement: Sequence[Placement], portable: Callable[[], bytes]
) -> Engine:
    from vivace.runtime.engine import Engine

    rest = (options.threads, placement, make_foreign(options.threads), portable)
    if knobs.check:
        from vivace.shadow import ShadowedEngine

        return ShadowedEngine(plan, image, *rest)
    return Engine(image, *rest)


def build(graph: Graph, options: Options) -> tuple[Plan, Image, Graph]:
    """Optimize, choose a precision, lower, generate and link; the graph is what was lowered."""
    graph = optimize_for_native(graph, options.level, options.kept)
    graph, facts = apply_precision(graph, options.precision, options.target)
    if options.tune is None:
        plan = make_plan(graph, options.target, options.providers, options.without)
        image = link_image(plan, options.target, options.cache, options.progress)
    else:
        plan, image = _tuned(graph, options, options.tune)
    image.facts.update(facts, **options.facts)
    return plan, image, graph


def _tuned(graph: Graph, options: Options, wanted: Tune) -> tuple[Plan, Image]:
    """Lower, generate and link as measuring says."""
    from vivace.lower.prepare import prepare
    from vivace.runtime.engine import Engine
    from vivace.tuning import Workshop, tuned

    graph, target, threads = prepare(graph), options.target, options.threads
    packed: Packed = {}
    known: Known = {}
    shop = Workshop(
        graph, target, threads,
        lambda choices: make_plan(graph, target, options.providers, options.without, choices, packed),
        lambda plan, choices: link_image(plan, target, False, None, choices, known),
        lambda image: Engine(image, threads, (), make_foreign(threads)),
    )  # fmt: skip
    plan, choices, facts = tuned(shop, wanted, options.progress)
    image = link_image(plan, target, options.cache, options.progress, choices)
    image.facts["tuning"] = facts
    return plan, image


def _automatic(
    job: Job, samples: Sequence[Mapping[str, np.ndarray]], max_drop: float | None, metric: str
) -> Engine | PartitionedEngine:
    """The engine whose layers have the formats that measuring chose; see `vivace.formats`."""
    from vivace.base.dtypes import DType
    from vivace.formats import METRICS, Engines, decide, regions
    from vivace.graph.sizes import late_nodes
    from vivace.lower.precision import narrow, products
    from vivace.lower.rules.half_products import is_fast_half
    from vivace.measure.inputs import choose_shapes, generate

    if max_drop is None or not max_drop >= 0:
        raise InputError("no tolerance", where="max_drop", expected="a number, 0 or more", hint="max_drop=0.01")
    if metric not in METRICS:
        raise InputError(f"unknown metric {metric!r}", expected=", ".join(METRICS))
    options = replace(job.options, precision="f32")
    exact = replace(job, options=options)
    halves = [h for h in (DType.bf16, DType.f16) if is_fast_half(h, options.target) or knobs.emulate]
    loaded = load_graph(job.source, job.shapes)
    graph = optimize_for_native(loaded, options.level, options.kept)
    layers = regions([(onnx_names(n), n.outputs[0]) for n in products(graph)])
    if not halves or not layers or late_nodes(loaded):
        why = "no products of halves" if not halves else "no layer that multiplies" if not layers else "late sizes"
        warn("precision", f"{why}: computed in f32")
        engine = exact.native()
        engine.facts["precision_note"] = f"{why}: computed in f32"
        return engine

    def make(formats: Mapping[str, str]) -> Engine:
        narrowed = graph
        for half in halves:
            only = [v for x, f in formats.items() if f == half.value for v in layers[x].values]
            narrowed = narrow(narrowed, half, only).graph if only else narrowed
        plan = make_plan(narrowed, options.target, options.providers, options.without)
        image = link_image(plan, options.target, options.cache, options.progress)
        return _engine(plan, image, options, placements(image), job.portable)

    def given(engine: Engine) -> Sequence[Mapping[str, np.ndarray]]:
        shapes, _ = choose_shapes(engine.inputs, {k: tuple(v) for k, v in (job.shapes or {}).items()})
        return samples or [generate(engine.inputs, shapes, seed) for seed in range(3)]

    layer_of = {name: x for x, region in layers.items() for name in region.nodes}
    measure = Engines(make, list(layers), layer_of, given, metric)
    decision = decide(list(layers), [h.value for h in halves], measure, max_drop)
    engine = measure.engine(decision.formats)
    measured_on = f"{len(samples)} given inputs" if samples else "3 sets of seeded inputs, for want of calibration"
    engine.facts.update(precision="auto", max_drop=max_drop, metric=metric, measured_on=measured_on, **options.facts)
    engine.facts.update(decision.facts())
    return engine


def load(path: str | Path, *, threads: int | None = None) -> Engine | PartitionedEngine:
    """Load a saved engine. On a CPU that lacks what its code needs, the model inside is compiled again.

    Raises: EngineError for a damaged file, one of another format, or one that can neither run nor be compiled here.
    """
    from vivace.runtime.engine import Engine, Placement
    from vivace.runtime.partitioned import PartitionedEngine, load_part
    from vivace.runtime.saved import SavedEngine
    from vivace.targets.cpu.amx import missing_here

    saved = SavedEngine(Path(path))

    def portable() -> bytes:
        return saved.checked_bytes("portable")

    missing = missing_here(saved.header["flags"])
    if missing:
        model = portable()
        if not model:
            raise EngineError(
                f"needs a CPU with {', '.join(missing)}", where=str(path), hint="compiling the model on this machine"
            )
        facts = saved.header["facts"]
        options = {k: facts[k] for k in ("precision", "max_drop", "metric", "level", "disable") if k in facts}
        return compile(model, threads=threads, **options)
    n_threads = threads_for(threads)
    program = saved.program()
    engines = [
        load_part(p, n_threads, portable, spin=len(program.parts) == 1) if p.image is None
        else Engine(p.image, n_threads, [Placement(*f) for f in program.placement], make_foreign(n_threads), portable)
        for p in program.parts
    ]  # fmt: skip
    if isinstance(engines[0], Engine) and len(engines) == 1:
        return engines[0]
    return PartitionedEngine(program, engines, n_threads, portable)


def portable_model(source: object, shapes: Mapping[str, Sequence[int]] | None) -> bytes:
    """The model as one ONNX file. A path is read again, so that an engine need not keep a second copy of the
    weights."""
    from vivace.onnx.exporter import export

    return export(load_graph(source, shapes)).SerializeToString()


def choose_isa(target: str) -> Isa:
    """The instruction set to generate for. Raises: InputError when this CPU lacks it or the name is unknown."""
    name = knobs.isa or ("" if target == "host" else target)
    if not name:
        from vivace.targets.cpu.amx import host_isa

        return host_isa()
    if name not in ISAS:
        raise InputError(f"unknown target {name!r}", expected="host, " + ", ".join(ISAS))
    missing = missing_flags(host(), isa(name))
    if missing:
        raise InputError(f"this CPU cannot run {name}", where="target", expected=f"a CPU with {', '.join(missing)}")
    return isa(name)


def threads_for(threads: int | None) -> int:
    """As many threads as the affinity mask and the container's quota allow, unless told. Raises: InputError below 1."""
    if threads is None:
        return knobs.threads or host().n_compute_threads
    if threads < 1:
        raise InputError(f"threads is {threads}", expected="at least 1")
    return threads


def load_graph(source: object, shapes: Mapping[str, Sequence[int]] | None) -> Graph:
    """Import a model, or take a graph as it is.

    A branch that never runs at the given shapes may contradict them; then the sizes stay symbolic, and the shapes are
    only checked to fit.
    """
    from vivace.graph.graph import Graph

    if isinstance(source, Graph):
        return source
    from vivace.onnx.importer import import_model

    try:
        return import_model(source, overrides=shapes)  # type: ignore[arg-type]
    except ModelError as refusal:
        if not shapes:
            raise
        from vivace.measure.inputs import check_shapes

        try:
            graph = import_model(source)  # type: ignore[arg-type]
            check_shapes([TensorSpec(v.name, v.dtype, v.shape) for v in graph.inputs], shapes)
        except VivaceError:
            raise refusal from None
        warn("compile", f"the shapes stay symbolic: {refusal}")
        return graph


def optimize_for_native(graph: Graph, level: int | str = 99, disable: Sequence[str] = ()) -> Graph:
    """The whole pipeline, layouts included."""
    from vivace.optimize.pipeline import optimize

    return optimize(graph, level=level, disable=tuple(disable))


def apply_precision(graph: Graph, precision: str, target: Isa) -> tuple[Graph, dict[str, object]]:
    """The graph with values stored as `precision` asks, and what an engine says of it.

    Where the CPU multiplies such numbers no faster, the graph stays in f32, with a notice; unless VIVACE_EMULATE is
    set.
    """
    if precision == "f32":
        return graph, {"precision": "f32"}
    from vivace.base.dtypes import DType
    from vivace.lower.precision import narrow
    from vivace.lower.rules.half_products import is_fast_half

    half = DType(precision)
    if not (is_fast_half(half, target) or knobs.emulate):
        note = f"{target.name} has no {precision} products with f32 sums, so it would not pay: computed in f32"
        warn("precision", note)
        return graph, {"precision": "f32", "precision_note": note}
    made = narrow(graph, half)
    return made.graph, {"precision": precision, "n_narrow_values": made.n_values, "n_narrow_products": made.n_products}


def build_image(
    graph: Graph,
    chosen: Isa,
    cache: bool,
    providers: Sequence[str],
    progress: Progress | None,
    without: frozenset[str] = frozenset(),
) -> Image:
    """Lower, generate and link."""
    return link_image(make_plan(graph, chosen, providers, without), chosen, cache, progress)


def make_plan(
    graph: Graph, chosen: Isa, providers: Sequence[str], without: frozenset[str] = frozenset(),
    choices: Choices | None = None, packed: Packed | None = None,
) -> Plan:  # fmt: skip
    """Lower. Raises: UnsupportedError for nodes that no chosen provider runs."""
    from vivace.lower.in_place import write_in_place
    from vivace.lower.lowering import lower

    refuse_unhosted(graph, providers)
    plan = lower(graph, chosen, without, choices, packed)
    is_apart = knobs.check or "in_place" in without
    return plan if is_apart else write_in_place(plan)


def link_image(
    plan: Plan, chosen: Isa, cache: bool, progress: Progress | None, choices: Choices | None = None,
    known: Known | None = None,
) -> Image:  # fmt: skip
    """Generate and link; `choices` are those that the plan was made with, `known` keeps kernels in memory."""
    from vivace.lower.image import KernelEntry
    from vivace.lower.link import Compiled, link
    from vivace.lower.plan import steps_of
    from vivace.targets.cpu.codegen import generate

    specs = [s.spec for s in steps_of(plan.body)]
    report = (lambda done, total: progress("compile", done, total)) if progress else None
    codes, numbers, objects, n_new = generate(specs, chosen, default_cache() if cache else None, report, choices, known)
    by_spec = {id(s): n for s, n in zip(specs, numbers, strict=True)}
    entries = [KernelEntry(c.name, c.dims, c.units, c.grain, c.scratch_bytes) for c in codes]
    compiled = Compiled(entries, objects, lambda s: by_spec[id(s)])
    return link(plan, compiled, chosen.name, foreign_model, {"n_kernels_compiled": n_new})


def refuse_unhosted(graph: Graph, providers: Sequence[str]) -> None:
    """Raises: UnsupportedError that lists the nodes without a kernel of ours, unless ONNX Runtime may run them."""
    if "onnxruntime" in providers or "auto" in providers:
        return
    nodes = [n for n in graph.walk() if n.op.name == "onnx"]
    if nodes:
        listed = ", ".join(f"{n.origin[0] if n.origin else n.outputs[0].name}" for n in nodes[:10])
        raise UnsupportedError(
            f"{len(nodes)} nodes have no kernel of ours: {listed}",
            where="providers",
            expected="a model of native operators",
            hint="providers=('native', 'onnxruntime')",
        )


def refuse_odd_types(provider: str, border: Sequence[Value]) -> None:
    """Raises: UnsupportedError for values that other providers do not take from NumPy: bf16, f8, 4-bit integers."""
    odd = [v for v in border if v.dtype.numpy.isbuiltin != 1]
    if odd:
        raise UnsupportedError(f"{odd[0]} cannot be handed over", where=provider, expected="types of NumPy's own")


def foreign_model(node: Node) -> bytes:
    """A model of one node, whose inputs are all inputs of the model: what another provider runs."""
    from vivace.graph.graph import Graph, Value
    from vivace.onnx.exporter import export

    ins = tuple(None if v is None else Value(f"in{i}", v.type) for i, v in enumerate(node.inputs))
    alone = replace(node, inputs=ins)
    return export(Graph(tuple(v for v in ins if v is not None), (alone,), alone.outputs)).SerializeToString()


def make_foreign(threads: int) -> MakeForeign:
    """How an engine runs the nodes that are not native: through ONNX Runtime."""

    def make(entry: ForeignEntry) -> ForeignRunner:
        from vivace.providers.onnxruntime import runner

        return runner(entry.model, threads)

    return make


def onnx_names(node: Node) -> list[str]:
    """The ONNX nodes that a node came from."""
    return [o for o in node.origin if not o.startswith("+")]


def placements(image: Image, islands: Mapping[str, str] | None = None) -> list[Placement]:
    """One record per ONNX node and the kernel that computes it; the reason says why not in the first provider, or why
    a node of a quantized model is no integer arithmetic (`optimize.islands`)."""
    from vivace.runtime.engine import Placement

    found: list[Placement] = []
    for i, line in enumerate(image.lines):
        if line.kind in ("run", "foreign"):
            provider = "native" if line.kind == "run" else "onnxruntime"
            foreign = "" if line.kind == "run" else "vivace has no kernel for this operator"
            found += [
                Placement(node, line.label, f"{i}:{line.label}", provider, foreign or (islands or {}).get(node, ""))
                for node in line.nodes
            ]
    return found
