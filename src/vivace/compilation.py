"""One model on its way to an engine: of our own code, in parts, or whole in another provider."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vivace.base.dtypes import DType
from vivace.base.errors import BranchError, ProviderError, UnsupportedError, VivaceError
from vivace.base.events import warn
from vivace.base.heap import trim
from vivace.base.specs import TensorSpec
from vivace.base.version import __version__
from vivace.building import (
    arena_bytes,
    build,
    is_by_rows,
    make_engine,
    may_slice,
    onnx_names,
    optimize_for_native,
    placements,
)
from vivace.options import Options

if TYPE_CHECKING:
    from vivace.graph.graph import Graph, Node, Value
    from vivace.lower.image import Batch
    from vivace.measure.compare import Tolerance
    from vivace.runtime.engine import Engine
    from vivace.runtime.partitioned import PartitionedEngine


@dataclass(frozen=True, slots=True)
class Compilation:
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
        """The engine of our own code, with parts in ONNX Runtime where sizes only show when the model runs, and for
        strings, which our memory does not hold."""
        from vivace.graph.sizes import late_nodes
        from vivace.optimize.islands import float_islands

        options = self.options
        started = time.perf_counter()
        tell = options.progress or (lambda stage, done, total: None)
        tell("import", 0, 1)
        graph, note = read_graph(self.source, self.shapes)
        if "onnxruntime" in options.providers and (late_nodes(graph) or textual_nodes(graph)):
            try:
                whole = self.portable_graph(graph)
                texts = textual_nodes(whole)
                return self.pieces(whole, dict.fromkeys(texts, "onnxruntime"), dict.fromkeys(texts, "it works on text"))
            except (UnsupportedError, ProviderError) as e:  # such as an operator of an opset that is not exported
                return self._in_f32(self.whole("onnxruntime", str(e)))
        tell("optimize", 0, 1)
        graph, batch = self._slice(graph)
        plan, image, graph = build(graph, options, batch)
        image.facts["compile_seconds"] = time.perf_counter() - started
        image.facts.update({"shapes_note": note} if note else {})
        engine = make_engine(plan, image, options, placements(image, graph, float_islands(graph)), self.portable)
        trim()
        return engine

    def _slice(self, graph: Graph) -> tuple[Graph, Batch | None]:
        """The graph for a few rows of its batch, where the size of the batch is fixed and its values would not stay
        near.

        What is fixed says nothing of which rows depend on which: that is read off the model with its sizes left open.
        """
        from vivace.base.dims import evaluate
        from vivace.base.machine import host
        from vivace.graph.sizes import graph_symbols
        from vivace.lower.image import Batch, rows_that_stay_near
        from vivace.onnx.importer import import_model

        shapes, sizes = self.shapes or {}, {v.shape[0] if v.rank else 1 for v in graph.inputs}
        total = sizes.pop() if len(sizes) == 1 else 1
        is_fixed = shapes.keys() == {v.name for v in graph.inputs} and not any(True for _ in graph_symbols(graph))
        is_open = graph is not self.source and may_slice(self.options)
        if not (is_fixed and is_open) or not isinstance(total, int) or total < 2:
            return graph, None
        near, values = host().cache_bytes(2), [v for n in graph.nodes for v in n.outputs]
        if rows_that_stay_near(sum(evaluate(v.type.bytes, {}) for v in values) // total, near) >= total:
            return graph, None  # even if all of them were alive at once

        def rows(n: int) -> Graph:
            few = {name: (n, *shape[1:]) for name, shape in shapes.items()}
            return import_model(self.source, overrides=few)  # type: ignore[arg-type]

        try:
            free = import_model(self.source)  # type: ignore[arg-type]
            if is_by_rows(free) or is_by_rows(optimize_for_native(free, self.options.level, self.options.kept)):
                most = rows_that_stay_near(arena_bytes(rows(1), self.options), near)
                each = next(k for k in range(min(most, total), 0, -1) if total % k == 0)
                return (graph, None) if each == total else (rows(each), Batch(total, each))
        except VivaceError:  # sizes that cannot be left open, or cannot be others
            pass
        return graph, None

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
        why = "its sizes only show when it runs"
        late = {n: f"{n.attrs['reason']}; {why}" if "reason" in n.attrs else why for n in late_nodes(graph)}
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
                records = placements(image, g, because)
                runners.append(make_engine(plan, image, self.options, records, self.portable))
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

        model: Any = self.source
        if not isinstance(model, (str, Path)):
            from vivace.onnx.reader import as_given

            model = as_given(model) or self.portable()
        fixed = {k: tuple(v) for k, v in (self.shapes or {}).items()}
        session = find(provider).load(model, LoadOptions(threads=self.options.threads, shapes=fixed))
        part = Part(provider, session.inputs, session.outputs)
        facts: dict[str, Any] = {"provider": provider, "reason": reason}
        program = Program((part,), part.inputs, part.outputs, [["*", "*", "the whole model", provider, reason]], facts)
        return PartitionedEngine(program, [session], self.options.threads, self.portable)


def textual_nodes(graph: Graph) -> list[Node]:
    """The nodes that read or write strings."""
    return [n for n in graph.nodes if any(v is not None and v.dtype is DType.string for v in (*n.inputs, *n.outputs))]


def _specs(values: Sequence[Value]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(v.name, v.dtype, v.shape) for v in values)


def load_graph(source: object, shapes: Mapping[str, Sequence[int]] | None) -> Graph:
    """Import a model, or take a graph as it is."""
    return read_graph(source, shapes)[0]


def read_graph(source: object, shapes: Mapping[str, Sequence[int]] | None) -> tuple[Graph, str]:
    """Import a model, or take a graph as it is.

    A branch that never runs at the given shapes may contradict them; then the sizes stay symbolic, and the shapes are
    only checked to fit. The text says so, and is empty elsewhere.
    """
    from vivace.graph.graph import Graph

    if isinstance(source, Graph):
        return source, ""
    from vivace.onnx.importer import import_model

    try:
        return import_model(source, overrides=shapes), ""  # type: ignore[arg-type]
    except BranchError as refusal:
        if not shapes:
            raise
        from vivace.measure.inputs import check_shapes

        try:
            graph = import_model(source)  # type: ignore[arg-type]
            check_shapes([TensorSpec(v.name, v.dtype, v.shape) for v in graph.inputs], shapes)
        except VivaceError:
            raise refusal from None
        return graph, f"a branch of the model cannot run at the given shapes, so that sizes stay open: {refusal}"


def portable_model(source: object, shapes: Mapping[str, Sequence[int]] | None) -> bytes:
    """The model as one ONNX file: as it was given, where it has operators of old opsets that cannot be written beside
    new ones. A path is read again, so that an engine need not keep a second copy of the weights."""
    from vivace.onnx.exporter import export
    from vivace.onnx.reader import as_given

    try:
        return export(load_graph(source, shapes)).SerializeToString()
    except UnsupportedError:
        if (given := as_given(source)) is None:
            raise
        return given


def refuse_odd_types(provider: str, border: Sequence[Value]) -> None:
    """Raises: UnsupportedError for values that other providers do not take from NumPy: bf16, f8, 4-bit integers."""
    odd = [v for v in border if v.dtype.numpy.isbuiltin != 1]
    if odd:
        raise UnsupportedError(f"{odd[0]} cannot be handed over", where=provider, expected="types of NumPy's own")
