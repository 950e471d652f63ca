"""What this machine could do at best: the time that counted work needs at measured peaks, per layer and in total.

    seconds(layer) = max(flops / arithmetic,
                         weights / bandwidth(where all weights lie) + activations / bandwidth(where they lie))

Rules:
* FUSED: an elementwise or data-moving node costs its arithmetic and no bytes, since a compiler can compute it where
  its operand is produced. Fusing the other nodes with each other could still save bytes that are counted here.
* NEAR: bytes come from the nearest cache that holds them. All weights are read once per inference, so they come from
  where all of them lie together; activations of a layer lie where those of that layer fit.
* ONCE: the body of a loop and each branch of an `if` count once.

Not handled: other element types than f32 (their arithmetic has other peaks; see `Peaks`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from vivace.base.dims import Dim, evaluate, symbols
from vivace.graph.graph import Graph, Node
from vivace.measure.peaks import Peaks

_FUSED_KINDS = frozenset({"elementwise", "movement"})


@dataclass(frozen=True, slots=True)
class Layer:
    """The counted work of one node; `name` is the ONNX node that it came from."""

    name: str
    op: str
    flops: int
    weight_bytes: int
    activation_bytes: int
    is_fused: bool


@dataclass(frozen=True, slots=True)
class Limit:
    """The least time of one layer, and which of the two bounds it."""

    layer: Layer
    seconds: float
    bound: str  # "arithmetic" or the name of a memory level


def layers(graph: Graph, sizes: Mapping[str, int]) -> tuple[Layer, ...]:
    """The work of every node when the symbols have these sizes; unknown symbols count as 1."""
    return tuple(_layer(node, sizes) for node in graph.walk())


def _layer(node: Node, sizes: Mapping[str, int]) -> Layer:
    cost = node.cost
    constants = {v for v in node.inputs if v is not None and v.data is not None}
    weight_bytes = sum(_number(v.type.bytes, sizes) for v in constants)
    return Layer(
        node.origin[0] if node.origin else node.output.name,
        node.op.name,
        _number(cost.flops, sizes),
        weight_bytes,
        max(0, _number(cost.bytes, sizes) - weight_bytes),
        node.op.kind in _FUSED_KINDS,
    )


def _number(dim: Dim, sizes: Mapping[str, int]) -> int:
    return evaluate(dim, {**{s.name: 1 for s in symbols(dim)}, **sizes})


def limits(work: Iterable[Layer], peaks: Peaks, threads: int, precision: str = "f32") -> Iterator[Limit]:
    """The least time of each layer at the peaks (FUSED, NEAR). With `precision` bf16 the numbers of a model in f32 take
    half of their bytes, and products run at that peak.
    """
    work = tuple(work)
    if precision == "bf16":
        work = tuple(
            replace(w, weight_bytes=w.weight_bytes // 2, activation_bytes=w.activation_bytes // 2) for w in work
        )
    all_weight_bytes = sum(layer.weight_bytes for layer in work)
    arithmetic = peaks.operations(precision, threads)
    weights_level = peaks.level_of(all_weight_bytes, threads)
    for layer in work:
        compute_s = layer.flops / arithmetic
        level, transfer_s = weights_level, 0.0
        if not layer.is_fused:
            near = peaks.level_of(layer.activation_bytes, threads)
            weight_s = layer.weight_bytes / peaks.read_bandwidth(weights_level, threads)
            activation_s = layer.activation_bytes / peaks.read_bandwidth(near, threads)
            transfer_s = weight_s + activation_s
            level = weights_level if weight_s > activation_s else near
        is_compute = compute_s >= transfer_s
        yield Limit(layer, max(compute_s, transfer_s), "arithmetic" if is_compute else level)


@dataclass(frozen=True, slots=True)
class Total:
    """A whole model: its counted work and the least time that this machine needs for it."""

    flops: int
    weight_bytes: int
    activation_bytes: int
    seconds: float

    def share(self, taken_seconds: float) -> float:
        """How near a measured time is to the limit: 1 is the limit."""
        return self.seconds / taken_seconds


def total(graph: Graph, sizes: Mapping[str, int], peaks: Peaks, threads: int, precision: str = "f32") -> Total:
    """Sums over all layers of a graph."""
    found = tuple(limits(layers(graph, sizes), peaks, threads, precision))
    return Total(
        sum(limit.layer.flops for limit in found),
        sum(limit.layer.weight_bytes for limit in found),
        sum(limit.layer.activation_bytes for limit in found),
        sum(limit.seconds for limit in found),
    )
