"""The driver: a model becomes an engine, a saved engine is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vivace.base.errors import EngineError, InputError, UnsupportedError
from vivace.base.events import warn
from vivace.base.knobs import knobs
from vivace.building import (
    link_image,
    make_engine,
    make_foreign,
    make_plan,
    onnx_names,
    optimize_for_native,
    placements,
)
from vivace.compilation import Compilation, load_graph, textual_nodes
from vivace.options import Options, Progress, checked_shapes, choose_isa, disabled_names, provider_names, threads_for

if TYPE_CHECKING:
    import numpy as np

    from vivace.graph.graph import Graph
    from vivace.lower.plan import Plan
    from vivace.runtime.engine import Engine
    from vivace.runtime.partitioned import PartitionedEngine

PRECISIONS = ("f32", "bf16", "f16", "auto")


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
    (`winograd`, `epilogues`, `trees`, `placement`, `strips`, `row_blocks`, `slices`, `in_place`):
    `benchmarks/ablations.py` shows what each brings.
    `tune` measures ways to make the kernels: `fast` for seconds, `full` for minutes, or `tune_budget` s; it keeps them
    here and in `timing_cache` (see `vivace timings`). `off` measures nothing, and takes the choices of a `timing_cache`
    where one is given. `progress(stage, done, total)` tells how far it is.
    `precision` is `f32`, `bf16` or `f16`: values between kernels and weights of products are stored in that type, sums
    stay in f32 (see `vivace.lower.precision`). Where the CPU has no products of the type with f32 sums it would not pay
    (no x86 CPU that we make code for has those of f16), and f32 is used: `engine.stats["precision_note"]` says so. With
    inputs in `calibration` the error against f32 is measured on them, `engine.stats["precision_error"]`.
    `auto` chooses by layer: a narrow format is kept where it measures faster and the outputs stay within `max_drop` of
    those in f32 by `metric` (relative, max_absolute, top1, cosine; `vivace.formats`), on the inputs in `calibration`,
    or else on seeded ones; products of bytes in a quantized model run in f32 where that measures faster.
    `engine.stats["layers"]` tells each layer's format, its error alone, and the time saved.
    Raises: ModelError, UnsupportedError (a node has no provider), InputError (a bad option).
    """
    if precision not in PRECISIONS:
        raise UnsupportedError(f"{precision!r} is not available", where="precision", expected=", ".join(PRECISIONS))
    from vivace.tuning import tune_of

    names = provider_names(providers)
    options = Options(
        threads_for(threads), choose_isa(target), names, precision, level,
        disabled_names(disable), cache, progress,
        tune_of(tune, tune_budget, timing_cache, cache),
    )  # fmt: skip
    samples = [calibration] if isinstance(calibration, Mapping) else list(calibration)
    _refuse_unused(options, bool(samples), max_drop is not None or metric != "relative")
    shapes = checked_shapes(shapes)
    job = Compilation(source, shapes, options)
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


def _refuse_unused(options: Options, has_samples: bool, has_tolerance: bool) -> None:
    """Raises: InputError for options of which one would have no effect beside another."""
    whole, precision = options.providers[:1] if "native" not in options.providers else (), options.precision
    if precision == "auto" and whole == ("auto",):
        raise InputError("formats and providers cannot be chosen by measurement in one", where="precision")
    if precision == "auto" and options.tune is not None:
        raise InputError("formats and kernels cannot be chosen by measurement in one", where="tune", expected="off")
    if options.tune is not None and whole not in ((), ("auto",)):
        raise InputError(f"{whole[0]} runs the whole model: its kernels are not tuned", where="tune", expected="off")
    if has_tolerance and precision != "auto":
        raise InputError("a tolerance has no effect with fixed formats", where="max_drop", expected="precision='auto'")
    if has_samples and precision == "f32":
        raise InputError("no error is measured in f32", where="calibration", expected="another precision")
    if has_samples and whole == ("auto",):
        raise InputError("no error is measured with providers='auto'", where="calibration", expected="none")
    if precision != "f32" and whole not in ((), ("auto",)):
        raise InputError(f"{whole[0]} runs the whole model in f32", where="precision", expected="f32")


def _automatic(
    job: Compilation, samples: Sequence[Mapping[str, np.ndarray]], max_drop: float | None, metric: str
) -> Engine | PartitionedEngine:
    """The engine whose layers have the formats that measuring chose; see `vivace.formats`."""
    from vivace.base.dtypes import DType
    from vivace.formats import METRICS, MOST_LAYERS, Engines, Region, decide, regions
    from vivace.graph.sizes import inner_demands, late_nodes
    from vivace.lower.choices import FLOATS, Choice, Choices
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
    products_of = [(onnx_names(n) or (n.outputs[0].name,), n.outputs[0]) for n in products(graph)] if halves else []
    floats = regions(products_of, MOST_LAYERS)
    is_cut = bool(late_nodes(loaded) or textual_nodes(loaded))
    lowering = (options.target, options.providers, options.without)

    def byte_layers(graph: Graph) -> dict[str, Region[str]]:
        if is_cut or not any(n.op.name in ("conv_integer", "matmul_integer") for n in graph.nodes):
            return {}
        sites = _byte_sites(loaded, make_plan(graph, *lowering, threads=options.threads))
        return regions(sites, len(sites))

    integers = byte_layers(graph)
    layers = {x: r.nodes for x, r in integers.items()} | {x: r.nodes for x, r in floats.items()}
    if not layers or is_cut:
        why = (
            "a model that is cut into parts gets no formats by layer" if is_cut
            else "no layer multiplies floats" if halves
            else f"{options.target.name} has no products of bf16 or f16 with f32 sums"
        )  # fmt: skip
        warn("precision", f"{why}: computed in f32")
        engine = exact.native()
        engine.facts["precision_note"] = f"{why}: computed in f32"
        return engine

    def make(formats: Mapping[str, str]) -> Engine:
        narrowed = graph
        for half in halves:
            only = [v for x, f in formats.items() if f == half.value for v in floats[x].values]
            narrowed = narrow(narrowed, half, only).graph if only else narrowed
        chosen = integers.keys() & formats.keys()
        here = integers if narrowed is graph or not chosen else byte_layers(narrowed)  # what is stored is in the key
        choices = Choices({key: Choice(way=FLOATS) for x in chosen if x in here for key in here[x].values})
        plan = make_plan(narrowed, *lowering, choices, threads=options.threads)
        image = link_image(plan, options.target, options.cache, options.progress, choices)
        return make_engine(plan, image, options, placements(image, graph), job.portable)

    def given(engine: Engine) -> Sequence[Mapping[str, np.ndarray]]:
        known = {k: tuple(v) for k, v in (job.shapes or {}).items()}
        shapes, _ = choose_shapes(engine.inputs, known, tuple(inner_demands(loaded)))
        return samples or [generate(engine.inputs, shapes, seed) for seed in range(3)]

    layer_of = {name: x for x, names in layers.items() for name in names}
    measure = Engines(make, list(layers), layer_of, given, metric)
    decision = decide(list(layers), [h.value for h in halves], measure, max_drop, integers)
    engine = measure.engine(decision.formats)
    measured_on = f"{len(samples)} given inputs" if samples else "3 sets of seeded inputs, for want of calibration"
    engine.facts.update(precision="auto", max_drop=max_drop, metric=metric, measured_on=measured_on, **options.facts)
    engine.facts.update(decision.facts())
    return engine


def _byte_sites(loaded: Graph, plan: Plan) -> list[tuple[list[str], str]]:
    """The sites of integer products that could be f32, by key, with the ONNX nodes that multiply there."""
    from vivace.lower.choices import FLOATS
    from vivace.lower.plan import steps_of

    products = {name for n in loaded.walk() if n.op.kind == "contraction" for name in onnx_names(n)}
    found: dict[str, list[str]] = {}
    for step in steps_of(plan.body):
        if step.site is not None and FLOATS in step.site.ways:
            names = [x for n in step.nodes for x in onnx_names(n)]
            found.setdefault(step.site.key, []).extend(dict.fromkeys(x for x in names if x in products))
    return [(names or [key], key) for key, names in found.items()]


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
    one = program.parts[0]
    if isinstance(engines[0], Engine) and (one.inputs, one.outputs) == (program.inputs, program.outputs):
        return engines[0]
    return PartitionedEngine(program, engines, n_threads, portable)
