"""The driver: import -> optimize -> lower -> generate -> link -> engine, on one screen."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vivace.base.cache import default_cache
from vivace.base.errors import EngineError, InputError, ModelError, UnknownSizeError, UnsupportedError, VivaceError
from vivace.base.events import warn
from vivace.base.knobs import knobs
from vivace.base.machine import ISAS, Isa, host, isa, missing_flags
from vivace.base.specs import TensorSpec

if TYPE_CHECKING:
    import numpy as np

    from vivace.graph.graph import Graph, Node
    from vivace.lower.choices import Choices
    from vivace.lower.image import ForeignEntry, Image
    from vivace.lower.plan import Plan
    from vivace.runtime.engine import Engine, ForeignRunner, MakeForeign, Placement
    from vivace.runtime.hosted import HostedEngine

PRECISIONS = ("f32", "bf16")
PROVIDERS = ("native", "onnxruntime", "openvino")
Progress = Callable[[str, int, int], None]


def compile(
    source: object,
    *,
    precision: str = "f32",
    threads: int | None = None,
    providers: Sequence[str] | str = ("native", "onnxruntime"),
    target: str = "host",
    tune: str = "fast",
    cache: bool = True,
    shapes: Mapping[str, Sequence[int]] | None = None,
    level: int | str = 99,
    disable: Sequence[str] = (),
    progress: Progress | None = None,
    calibration: Mapping[str, np.ndarray] | Sequence[Mapping[str, np.ndarray]] = (),
) -> Engine | HostedEngine:
    """Compile a model for this machine.

    `source`: a path, bytes, an onnx.ModelProto, or a graph. `shapes` fixes the dims of named inputs; others stay
    symbolic. `target` is `host` or an instruction set (`sse`, `avx2`, `avx512`).
    `providers` lists who may compute, the first choice first: with `native` alone a node that we have no kernel for is
    an error; without `native` the first provider runs the whole model; `auto` measures all and keeps the fastest.
    `disable` names passes and rules of the optimizer (docs/rules.md) to leave out, and `winograd`.
    `tune` has no effect yet: tiles come from a model of the machine. `progress(stage, done, total)` is called as work
    goes on.
    `precision` is `f32`, or `bf16`: values between kernels and weights of products are stored in bf16, sums stay in
    f32 (see `vivace.lower.precision`). Where the CPU has no bf16 products it would not pay, and f32 is used:
    `engine.stats["precision_note"]` says so. With inputs in `calibration` the error against f32 is measured on them,
    `engine.stats["precision_error"]`.
    Raises: ModelError, UnsupportedError (a node has no provider), InputError (a bad option).
    """
    if precision not in PRECISIONS:
        raise UnsupportedError(f"precision {precision!r} is not available", expected=", ".join(PRECISIONS))
    names = tuple(providers.split(",")) if isinstance(providers, str) else tuple(providers)
    n_threads = threads_for(threads)
    samples = [calibration] if isinstance(calibration, Mapping) else list(calibration)
    for name in names:
        if name not in (*PROVIDERS, "auto"):
            raise InputError(f"unknown provider {name!r}", where="providers", expected=", ".join((*PROVIDERS, "auto")))

    def native() -> Engine:
        return _compile_native(
            source, n_threads, names, choose_isa(target), cache, shapes, level, disable, progress, precision, samples
        )

    if names == ("auto",):
        from vivace.choice import fastest

        return fastest(native, source, shapes, n_threads)
    if "native" not in names:
        from vivace.providers.provider import LoadOptions
        from vivace.runtime.hosted import HostedEngine

        fixed = {k: tuple(v) for k, v in (shapes or {}).items()}
        return HostedEngine(names[0], source, LoadOptions(threads=n_threads, shapes=fixed), "asked for")  # type: ignore[arg-type]
    try:
        return native()
    except UnknownSizeError as e:
        if "onnxruntime" not in names:
            raise
        return _hosted_whole(source, n_threads, shapes, str(e))


def _hosted_whole(
    source: object, threads: int, shapes: Mapping[str, Sequence[int]] | None, reason: str
) -> HostedEngine:
    """The whole model in ONNX Runtime, for models whose sizes only show when they run."""
    from vivace.providers.provider import LoadOptions
    from vivace.runtime.hosted import HostedEngine

    nodes = [(n.origin[0] if n.origin else n.outputs[0].name, n.op.name) for n in load_graph(source, shapes).walk()]
    model = source if isinstance(source, (str, bytes, Path)) else portable_model(source, shapes)
    fixed = {k: tuple(v) for k, v in (shapes or {}).items()}
    return HostedEngine("onnxruntime", model, LoadOptions(threads=threads, shapes=fixed), reason, nodes)


def _compile_native(
    source: object,
    threads: int,
    providers: Sequence[str],
    target: Isa,
    cache: bool,
    shapes: Mapping[str, Sequence[int]] | None,
    level: int | str,
    disable: Sequence[str],
    progress: Progress | None,
    precision: str = "f32",
    samples: Sequence[Mapping[str, np.ndarray]] = (),
) -> Engine:
    from vivace.optimize.islands import float_islands
    from vivace.runtime.engine import Engine

    started = time.perf_counter()
    tell = progress or (lambda stage, done, total: None)
    tell("import", 0, 1)
    graph = load_graph(source, shapes)
    tell("optimize", 0, 1)
    from vivace.lower.lowering import OPTIONS

    without = frozenset(disable) & OPTIONS.keys()
    graph = optimize_for_native(graph, level, [name for name in disable if name not in without])
    exact = graph
    graph, facts = apply_precision(graph, precision, target)
    plan = make_plan(graph, target, providers, without)
    image = link_image(plan, target, cache, progress)
    image.facts.update(facts)
    image.facts["compile_seconds"] = time.perf_counter() - started
    rest = (placements(image, float_islands(graph)), make_foreign(threads), lambda: portable_model(source, shapes))
    if knobs.check:
        from vivace.shadow import ShadowedEngine

        return ShadowedEngine(plan, image, threads, *rest)
    engine = Engine(image, threads, *rest)
    if samples and graph is not exact:
        plan = make_plan(exact, target, providers, without)
        f32 = Engine(link_image(plan, target, cache, progress), threads, (), make_foreign(threads))
        image.facts["precision_error"] = measure_error(engine, f32, samples)
    return engine


def measure_error(engine: Engine, f32: Engine, samples: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, object]]:
    """For each output of floats how far an engine is from another on the worst of some inputs."""
    from vivace.measure.compare import Difference, compare

    worst: dict[str, Difference] = {}
    for sample in samples:
        for d in compare(engine.run(sample), f32.run(sample)):
            if d.name not in worst or d.snr_db < worst[d.name].snr_db:
                worst[d.name] = d
    return [
        {"output": d.name, "snr_db": d.snr_db, "max_absolute": d.max_absolute, "n_special": d.n_special}
        for d in worst.values()
    ]


def load(path: str | Path, *, threads: int | None = None) -> Engine | HostedEngine:
    """Load a saved engine. On a CPU that lacks what its code needs, the model inside is compiled again.

    Raises: EngineError for a damaged file, one of another format, or one that can neither run nor be compiled here.
    """
    from vivace.runtime.engine import Engine, Placement
    from vivace.runtime.saved import SavedEngine
    from vivace.targets.cpu.amx import missing_here

    saved = SavedEngine(Path(path))
    missing = missing_here(saved.header["flags"])
    if missing:
        model = saved.checked_bytes("portable")
        if not model:
            raise EngineError(
                f"needs a CPU with {', '.join(missing)}", where=str(path), hint="compiling the model on this machine"
            )
        precision = saved.header["image"]["facts"].get("precision", "f32")
        return compile(model, threads=threads, precision=precision)
    n_threads = threads_for(threads)
    placement = [Placement(*p) for p in saved.header["placement"]]
    return Engine(saved.image(), n_threads, placement, make_foreign(n_threads), lambda: saved.checked_bytes("portable"))


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
    from vivace.lower.precision import narrow

    if not (target.has("avx512_bf16") or target.has("amx_bf16") or knobs.emulate):
        note = f"{target.name} has no bf16 products, so that bf16 would not pay: computed in f32"
        warn("precision", note)
        return graph, {"precision": "f32", "precision_note": note}
    made = narrow(graph)
    return made.graph, {"precision": "bf16", "n_narrow_values": made.n_values, "n_narrow_products": made.n_products}


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


def make_plan(graph: Graph, chosen: Isa, providers: Sequence[str], without: frozenset[str] = frozenset()) -> Plan:
    """Lower. Raises: UnsupportedError for nodes that no chosen provider runs."""
    from vivace.lower.lowering import lower

    refuse_unhosted(graph, providers)
    return lower(graph, chosen, without)


def link_image(
    plan: Plan, chosen: Isa, cache: bool, progress: Progress | None, choices: Choices | None = None
) -> Image:
    """Generate and link; `choices` are those that the plan was made with."""
    from vivace.lower.choices import NO_CHOICES
    from vivace.lower.image import KernelEntry
    from vivace.lower.link import Compiled, link
    from vivace.lower.plan import steps_of
    from vivace.targets.cpu.codegen import generate

    specs = [s.spec for s in steps_of(plan.body)]
    report = (lambda done, total: progress("compile", done, total)) if progress else None
    codes, numbers, objects, n_new = generate(
        specs, chosen, default_cache() if cache else None, report, choices or NO_CHOICES
    )
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
