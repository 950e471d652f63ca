"""Graph -> Plan -> Image -> Engine, with the precision, the choices and the providers that the options say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from vivace.base.cache import default_cache
from vivace.base.errors import UnsupportedError
from vivace.base.events import warn
from vivace.base.knobs import knobs
from vivace.base.machine import Isa
from vivace.base.mapped import forget
from vivace.options import Options, Progress

if TYPE_CHECKING:
    from vivace.graph.graph import Graph, Node
    from vivace.lower.choices import Choices
    from vivace.lower.image import Batch, ForeignEntry, Image
    from vivace.lower.packed import Packed
    from vivace.lower.plan import Plan
    from vivace.runtime.engine import Engine, ForeignRunner, MakeForeign, Placement
    from vivace.targets.cpu.codegen import Known
    from vivace.tuning import Tune


def build(graph: Graph, options: Options, batch: Batch | None = None) -> tuple[Plan, Image, Graph]:
    """Optimize, choose a precision, lower, generate and link; the graph is what was lowered, a slice of `batch` where
    that is given."""
    from vivace.lower.image import Batch

    graph = optimize_for_native(graph, options.level, options.kept)
    graph, facts = apply_precision(graph, options.precision, options.target)
    if options.tune is None:
        plan = make_plan(graph, options.target, options.providers, options.without, threads=options.threads)
        image = link_image(plan, options.target, options.cache, options.progress)
    else:
        plan, image = _tuned(graph, options, options.tune)
    image.facts.update(facts, **options.facts)
    if batch is None and may_slice(options) and is_by_rows(graph):
        batch = Batch(image.inputs[0].shape[0])
    return plan, replace(image, batch=batch), graph


def arena_bytes(graph: Graph, options: Options) -> int:
    """What the values of a graph of fixed sizes will take, in bytes, without generating any code."""
    from vivace.lower.memory import Lifetime, plan_memory
    from vivace.lower.schedule import schedule

    graph = optimize_for_native(graph, options.level, options.kept)
    graph, _ = apply_precision(graph, options.precision, options.target)
    plan = make_plan(graph, options.target, options.providers, options.without, threads=options.threads)
    lifetimes = schedule(plan).lifetimes
    lives = [
        Lifetime(s.bytes, *life) for s, life in lifetimes.items() if s.kind == "arena" and isinstance(s.bytes, int)
    ]
    return plan_memory(lives).arena_bytes


def may_slice(options: Options) -> bool:
    return not knobs.check and "slices" not in options.without


def is_by_rows(graph: Graph) -> bool:
    """Whether a graph takes a batch of any size, and each of its rows stands for itself."""
    from vivace.graph.batch import rows_of, why_not_by_rows

    rows = rows_of(graph)
    return rows is not None and not why_not_by_rows(graph, rows.name)


def _tuned(graph: Graph, options: Options, wanted: Tune) -> tuple[Plan, Image]:
    """Lower, generate and link as measuring says."""
    from vivace.lower.packed import Packed
    from vivace.lower.prepare import prepare
    from vivace.runtime.engine import Engine
    from vivace.tuning import Workshop, tuned

    graph, target, threads = prepare(graph), options.target, options.threads
    packed = Packed()
    known: Known = {}
    shop = Workshop(
        graph, target, threads,
        lambda choices: make_plan(graph, target, options.providers, options.without, choices, packed, threads),
        lambda plan, choices: link_image(plan, target, False, None, choices, known),
        lambda image: Engine(image, threads, (), make_foreign(threads)),
    )  # fmt: skip
    _, choices, facts = tuned(shop, wanted, options.progress)
    packed = Packed()  # weights of the ways that lost would stay in memory among these
    plan = shop.plan(choices)
    image = link_image(plan, target, options.cache, options.progress, choices)
    image.facts["tuning"] = facts
    return plan, image


def optimize_for_native(graph: Graph, level: int | str = 99, disable: Sequence[str] = ()) -> Graph:
    """The whole pipeline, layouts included. Weights that it read from a mapped file leave memory until they are packed:
    6 of 93 MiB of PP-OCR's recogniser at its peak.
    """
    from vivace.optimize.pipeline import optimize

    found = optimize(graph, level=level, disable=tuple(disable))
    for v in graph.constants():
        if v.data is not None:
            forget(v.data)
    return found


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


def make_plan(
    graph: Graph, chosen: Isa, providers: Sequence[str], without: frozenset[str] = frozenset(),
    choices: Choices | None = None, packed: Packed | None = None, threads: int = 1,
) -> Plan:  # fmt: skip
    """Lower, for so many threads to share the work. Raises: UnsupportedError for nodes that no chosen provider runs."""
    from vivace.lower.in_place import write_in_place
    from vivace.lower.lowering import lower
    from vivace.lower.row_blocks import in_row_blocks
    from vivace.lower.strips import in_strips

    refuse_unhosted(graph, providers)
    plan = lower(graph, chosen, without, choices, packed)
    if knobs.check:  # every value is wanted, in a place of its own
        return plan
    plan = plan if "strips" in without else in_strips(plan)
    plan = plan if "row_blocks" in without else in_row_blocks(plan, threads)
    return plan if "in_place" in without else write_in_place(plan)


def link_image(
    plan: Plan, chosen: Isa, cache: bool, progress: Progress | None, choices: Choices | None = None,
    known: Known | None = None,
) -> Image:  # fmt: skip
    """Generate and link; `choices` are those that the plan was made with, `known` keeps kernels in memory."""
    from vivace.base.specs import TensorSpec
    from vivace.lower.conversions import report as report_conversions
    from vivace.lower.image import KernelEntry
    from vivace.lower.link import Compiled, link
    from vivace.lower.plan import steps_of
    from vivace.measure.inputs import choose_shapes
    from vivace.targets.cpu.codegen import generate

    specs = [s.spec for s in steps_of(plan.body)]
    report = (lambda done, total: progress("compile", done, total)) if progress else None
    codes, numbers, objects, n_new = generate(specs, chosen, default_cache() if cache else None, report, choices, known)
    by_spec = {id(s): n for s, n in zip(specs, numbers, strict=True)}
    entries = [KernelEntry(c.name, c.dims, c.units, c.grain, c.scratch_bytes) for c in codes]
    compiled = Compiled(entries, objects, lambda s: by_spec[id(s)])
    _, usual = choose_shapes([TensorSpec(v.name, v.dtype, v.shape) for v in plan.inputs], {})
    facts = {"n_kernels_compiled": n_new, **report_conversions(plan, usual)}
    return link(plan, compiled, chosen.name, foreign_model, facts)


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


def make_engine(
    plan: Plan, image: Image, options: Options, placement: Sequence[Placement], portable: Callable[[], bytes]
) -> Engine:
    from vivace.runtime.engine import Engine

    rest = (options.threads, placement, make_foreign(options.threads), portable)
    if knobs.check:
        from vivace.shadow import ShadowedEngine

        return ShadowedEngine(plan, image, *rest)
    return Engine(image, *rest)


def onnx_names(node: Node) -> list[str]:
    """The ONNX nodes that a node came from."""
    return [o for o in node.origin if not o.startswith("+")]


def placements(image: Image, graph: Graph, islands: Mapping[str, str] | None = None) -> list[Placement]:
    """One record per ONNX node of a graph and the kernel that computes it; the reason says why not in the first
    provider, or why a node of a quantized model is no integer arithmetic (`optimize.islands`)."""
    from vivace.runtime.engine import Placement

    left = {name: n.attrs.get("reason", "") for n in graph.walk() if n.op.name == "onnx" for name in onnx_names(n)}
    found: list[Placement] = []
    for i, line in enumerate(image.lines):
        if line.kind in ("run", "foreign"):
            provider = "native" if line.kind == "run" else "onnxruntime"
            reasons = islands or {} if line.kind == "run" else left
            found += [
                Placement(node, line.label, f"{i}:{line.label}", provider, reasons.get(node, "")) for node in line.nodes
            ]
    return found
