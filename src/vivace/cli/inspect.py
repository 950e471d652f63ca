"""`vivace inspect`: what is in a model or a saved engine, what it costs, and where its operators would run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vivace.cli import options
from vivace.cli.scaling import print_scaling, scaling_of, thread_counts

if TYPE_CHECKING:
    from vivace.graph.graph import Graph
    from vivace.measure.roofline import Layer
    from vivace.measure.scaling import Scaling
    from vivace.runtime.engine import Placement


def inspect_model(
    model: options.ModelOrEngine,
    shapes: options.Shapes = [],
    level: options.Level = "extended",
    layers: Annotated[
        bool, typer.Option(help="Print every layer, not only the most expensive; of an engine, every node.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(help="Draw the graph before and after the optimizer on this page.", show_default=False),
    ] = None,
    threads: Annotated[
        str, typer.Option(metavar="4,8,...", help="Predict times on so many cores from steps timed here.")
    ] = "",
    as_json: options.Json = False,
) -> None:
    """Shows a model's inputs, outputs, operators, parameters, work per layer, memory, and where its nodes would run.

    Example: vivace inspect model.onnx --shapes x:1x3x224x224 --json
    """
    from vivace.cli.console import plain, print_json, progress

    options.check_model(model, or_engine=True)
    options.check_output(html)
    counts = thread_counts(threads)
    with progress() as show:
        if show:
            show(f"reading {model.name}", 0, 1)
        scaling = scaling_of(model, shapes, counts, show) if counts else None
        seen = None if options.is_saved(model) else examine(model, options.shapes_of(shapes), options.level_of(level))
    if seen is None:
        _inspect_engine(model, as_json, scaling, show_all=layers)
        return
    found, before, after = seen
    if html is not None:
        from vivace.base.cache import write_atomic
        from vivace.cli.picture import graph_page

        write_atomic(html, [graph_page(model.name, {"as imported": before, "optimized": after}).encode()])
    if as_json:
        print_json(plain(found) | ({"scaling": plain(scaling)} if scaling else {}))
        return
    _print(found, show_all=layers)
    if scaling:
        print_scaling(scaling)


@dataclass(frozen=True, slots=True)
class Place:
    """Where an ONNX node would run."""

    node: str
    domain: str
    provider: str
    reason: str


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a model is and needs. `live_bytes` is the most that values alive at once take, before any reuse in place."""

    model: str
    file_bytes: int
    producer: str
    ir_version: int
    opsets: dict[str, int]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    onnx_ops: dict[str, int]
    core_ops: dict[str, int]
    n_parameters: int
    parameter_bytes: int
    flops: int
    weight_bytes: int
    activation_bytes: int
    live_bytes: int
    layers: tuple[Layer, ...]
    elsewhere: tuple[Place, ...]


def examine(path: Path, given: Mapping[str, Sequence[int]], level: int) -> tuple[Inspection, Graph, Graph]:
    """The facts, and the graph before and after the optimizer."""
    from vivace.base.specs import TensorSpec
    from vivace.graph.sizes import inner_demands
    from vivace.measure.inputs import choose_shapes
    from vivace.measure.roofline import layers
    from vivace.onnx.importer import import_model
    from vivace.onnx.reader import read
    from vivace.optimize.pipeline import optimize

    source = read(path)
    imported = import_model(path)
    graph = optimize(imported, level=level)
    specs = [TensorSpec(v.name, v.dtype, v.shape) for v in imported.inputs]
    chosen, sizes = choose_shapes(specs, given, tuple(inner_demands(imported)))
    work = layers(graph, sizes)
    constants = _constants(graph)
    found = Inspection(
        model=str(path),
        file_bytes=path.stat().st_size,
        producer=f"{source.proto.producer_name} {source.proto.producer_version}".strip(),
        ir_version=source.proto.ir_version,
        opsets=dict(source.opsets),
        inputs=tuple(str(v).removeprefix("%") for v in imported.inputs),
        outputs=tuple(str(v).removeprefix("%") for v in imported.outputs),
        shapes=chosen,
        onnx_ops=dict(_onnx_ops(source.proto.graph).most_common()),
        core_ops=dict(Counter(n.op.name for n in graph.walk()).most_common()),
        n_parameters=sum(v.data.size for v in constants if v.data is not None and v.dtype.is_float),
        parameter_bytes=sum(v.data.nbytes for v in constants if v.data is not None),
        flops=sum(layer.flops for layer in work),
        weight_bytes=sum(layer.weight_bytes for layer in work),
        activation_bytes=sum(layer.activation_bytes for layer in work if not layer.is_fused),
        live_bytes=_live_bytes(graph, sizes),
        layers=work,
        elsewhere=tuple(_elsewhere(graph)),
    )
    return found, imported, graph


def _onnx_ops(graph: Any) -> Counter[str]:
    """Operators by name, those of nested graphs included."""
    found: Counter[str] = Counter()
    for node in graph.node:
        found[
            f"{node.domain}.{node.op_type}".lstrip(".").removeprefix("ai.onnx.") if node.domain else node.op_type
        ] += 1
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                found += _onnx_ops(inner)
    return found


def _constants(graph: Graph) -> list[Any]:
    from vivace.graph.graph import subgraphs

    found = {id(v.data): v for v in graph.constants()}
    for node in graph.nodes:
        for inner in subgraphs(node):
            found |= {id(v.data): v for v in _constants(inner)}
    return list(found.values())


def _live_bytes(graph: Graph, sizes: Mapping[str, int]) -> int:
    from vivace.base.dims import evaluate, symbols

    def bytes_of(value: Any) -> int:
        total = value.type.bytes
        return evaluate(total, {**{s.name: 1 for s in symbols(total)}, **sizes})

    last = {value: i for i, node in enumerate(graph.nodes) for value in node.inputs if value is not None}
    last |= {value: len(graph.nodes) for value in graph.outputs}
    live = sum(bytes_of(v) for v in graph.inputs)
    most = live
    for i, node in enumerate(graph.nodes):
        live += sum(bytes_of(v) for v in node.outputs)
        most = max(most, live)
        dying = {v for v in (*node.inputs, *node.outputs) if v is not None and v.data is None and last.get(v, i) <= i}
        live -= sum(bytes_of(v) for v in dying)
    return most


def _elsewhere(graph: Graph) -> list[Place]:
    """The nodes that no kernel of ours computes."""
    return [
        Place(
            node.origin[0] if node.origin else node.output.name,
            str(node.attrs.get("domain") or "ai.onnx"),
            "onnxruntime",
            str(node.attrs.get("reason", "")) or "vivace has no kernel for this operator",
        )
        for node in graph.walk()
        if node.op.name == "onnx"
    ]


_N_SHOWN = 12


def _print(found: Inspection, show_all: bool) -> None:
    from vivace.cli.console import amount, print_table, shapes_text, size

    opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in found.opsets.items())
    print(f"{found.model}  {size(found.file_bytes)}, {found.producer or 'unknown producer'}, opset {opsets}")
    for name, specs in (("inputs", found.inputs), ("outputs", found.outputs)):
        for i, spec in enumerate(specs):
            print(f"{name if i == 0 else '':10} {spec}")
    print(f"{'at':10} {shapes_text(found.shapes)}")
    print(f"{'parameters':10} {amount(found.n_parameters)} in {size(found.parameter_bytes)}")
    moved = f"{size(found.weight_bytes)} of weights and {size(found.activation_bytes)} of activations"
    n_layers = sum(not x.is_fused for x in found.layers)
    print(f"{'work':10} {amount(found.flops)}FLOP, {moved} moved by {n_layers} layers")
    print(f"{'memory':10} {size(found.live_bytes)} of activations alive at once")
    print(f"{'ONNX ops':10} {', '.join(f'{n} {op}' for op, n in found.onnx_ops.items())}")
    print(f"{'core ops':10} {', '.join(f'{n} {op}' for op, n in found.core_ops.items())}")
    shown = [x for x in found.layers if show_all or not x.is_fused]
    if not show_all:
        largest = set(map(id, sorted(shown, key=lambda x: -x.flops)[:_N_SHOWN]))
        shown = [x for x in shown if id(x) in largest]
    rows = [
        [x.name, x.op, amount(x.flops), size(x.weight_bytes), size(x.activation_bytes),
         f"{x.flops / max(1, x.weight_bytes + x.activation_bytes):.1f}"]
        for x in shown
    ]  # fmt: skip
    title = "layers" if show_all else f"the {len(rows)} layers with most arithmetic (--layers shows all)"
    print_table(title, ["layer", "op", "FLOP", "weights", "activations", "FLOP/byte"], rows, left=2)
    if not found.elsewhere:
        print("every node would run natively")
    for place in found.elsewhere:
        print(f"{place.node} ({place.domain}) would run in {place.provider}: {place.reason}")


def _print_tuning(facts: dict[str, Any]) -> None:
    from vivace.cli.compile import tuned
    from vivace.cli.console import print_table

    print(f"{'tuning':24} {tuned(facts)}")
    rows = [[c["site"], c["choice"], f"{c['ratio']:.2f}"] for c in facts["changes"]]
    if rows:
        print_table("", ["kernel", "made with", "time over default's"], rows, left=2)


def _inspect_engine(path: Path, as_json: bool, scaling: Scaling | None, show_all: bool) -> None:
    import vivace
    from vivace.cli.console import plain, print_json, size

    engine = vivace.load(path)
    if as_json:
        print_json(
            {
                "engine": str(path),
                "inputs": list(map(str, engine.inputs)),
                "outputs": list(map(str, engine.outputs)),
                "stats": plain(engine.stats),
                "placement": plain(engine.placement),
                "conversions": plain(engine.conversions),
            }
            | ({"scaling": plain(scaling)} if scaling else {})
        )
        return
    print(f"{path}  {size(path.stat().st_size)}")
    for name, specs in (("inputs", engine.inputs), ("outputs", engine.outputs)):
        for i, spec in enumerate(specs):
            print(f"{name if i == 0 else '':24} {spec}")
    layers = engine.stats.get("layers")
    for fact, value in engine.stats.items():
        if fact == "tuning" and isinstance(value, dict):
            _print_tuning(value)
            continue
        if fact in ("layers", "conversions"):
            continue
        print(f"{fact:24} {_shown(fact, value)}")
    if isinstance(layers, list):
        _print_layers(layers)
    _print_conversions(engine.conversions)
    _print_placement(engine.placement, show_all)
    if scaling:
        print_scaling(scaling)


def _print_placement(placement: Sequence[Placement], show_all: bool) -> None:
    """Every node with its kernel, or those alone that have a reason to be where they are."""
    for place in placement:
        because = f", because {place.reason}" if place.reason else ""
        if show_all or because or place.provider != "native":
            print(f"{place.node} ({place.op}) -> {place.kernel} in {place.provider}{because}")
    n = len({place.node for place in placement if place.provider == "native"})
    print(f"{n} ONNX nodes run natively" + ("" if show_all else " (--layers shows the kernel of each)"))


def _shown(fact: str, value: object) -> str:
    from vivace.cli.console import size

    if isinstance(value, int) and fact.endswith("_bytes"):
        return size(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{count} {name}" for name, count in value.items()) or "-"
    return ", ".join(map(str, value)) or "-" if isinstance(value, list) else str(value)


def _print_conversions(conversions: Sequence[Mapping[str, Any]]) -> None:
    from vivace.cli.console import print_table, size

    rows = [
        [c["value"], c["step"], c["before"], c["after"], c["why"], size(c["bytes"]), f"{c['cost_us']:.1f}"]
        for c in conversions
    ]
    if rows:
        print_table(
            "conversions that are steps", ["value", "step", "from", "to", "because", "bytes", "us"], rows, left=5
        )


def _print_layers(layers: Sequence[Mapping[str, Any]]) -> None:
    from vivace.cli.console import print_table

    rows = [[x["layer"], x["format"], x["reason"], f"{x['error']:.2g}", f"{x['saved_ms']:.3f}"] for x in layers]
    print_table(
        "precision by layer", ["layer", "format", "its own format because of", "error", "saved ms"], rows, left=3
    )
