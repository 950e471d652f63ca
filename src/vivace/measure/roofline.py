"""What this machine could do at best: the time that counted work needs at measured peaks, per layer and in total.

    seconds(layer) = max(operations / arithmetic(type), seconds of its weights + seconds of its activations)

No inference takes less that runs layer after layer: what is not known is counted in favour of the machine.

Rules:
* FUSED: an elementwise or data-moving node costs its arithmetic and no bytes, since a compiler can compute it where
  its operand is produced. Fusing the other nodes with each other could still save bytes that are counted here.
* NEAR: bytes come from the nearest caches, from each as many as it holds. All weights are read once per inference: what
  the caches keep of them from the last is shared out evenly. The activations of a layer have the caches for themselves.
* FEWEST: a convolution costs the operations of the way that has the fewest, Winograd's without the transforms.
  `Layer.flops` are those of the definition.
* ONCE: the body of a loop counts once, and of the branches of an `if` the one with less work. A weight that several
  nodes read counts where it is read first. What is read or written at computed positions is counted by the positions.
* TYPE: products of bytes run at the peak of i8, products of floats at that of the precision, all else at that of f32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

from vivace.base.dims import Dim, evaluate, symbols
from vivace.base.dtypes import DType
from vivace.graph.graph import Graph, Node, Value, subgraphs
from vivace.lower.cook_toom import N_TAPS, n_inputs, tile_sizes
from vivace.lower.rules.winograd import LARGEST_M
from vivace.measure.peaks import Peaks

_FUSED_KINDS = frozenset({"elementwise", "movement"})
_BYTE_PRODUCTS = frozenset({"conv_integer", "matmul_integer", "matmul_blocks"})  # the last may become them
_GATHERS = frozenset({"gather", "gather_elements", "gather_nd"})  # read some elements of their first operand
_SCATTERS = frozenset({"scatter_elements", "scatter_nd"})  # write some elements of theirs


@dataclass(frozen=True, slots=True)
class Layer:
    """The counted work of one node; `name` is the ONNX node that it came from. See FEWEST for `fewest_flops`, TYPE for
    `dtype`.
    """

    name: str
    op: str
    flops: int
    weight_bytes: int
    activation_bytes: int
    is_fused: bool
    dtype: str = "f32"
    fewest_flops: int | None = None


@dataclass(frozen=True, slots=True)
class Limit:
    """The least time of one layer, and which of the two bounds it."""

    layer: Layer
    seconds: float
    bound: str  # "arithmetic" or "bytes"


def layers(graph: Graph, sizes: Mapping[str, int], precision: str = "f32") -> tuple[Layer, ...]:
    """The work of every node when the symbols have these sizes; unknown symbols count as 1. With `precision` bf16 the
    numbers of a model in f32 take half of their bytes.
    """
    return _Counting(sizes, precision).layers(graph, set())


@dataclass(frozen=True, slots=True)
class _Counting:
    sizes: Mapping[str, int]
    precision: str

    def layers(self, graph: Graph, read: set[int]) -> tuple[Layer, ...]:
        """`read` are the constants that were read before (ONCE)."""
        found: list[Layer] = []
        for node in graph.nodes:
            bodies = [self.layers(body, set(read)) for body in subgraphs(node)]
            if bodies:
                found += min(bodies, key=_work)
                continue
            found.append(self._layer(node, read))
            read |= {id(v.data) for v in node.inputs if v is not None and v.data is not None}
        return tuple(found)

    def _layer(self, node: Node, read: set[int]) -> Layer:
        flops = self._number(node.cost.flops)
        operands = [v for v in _counted(node) if id(v.data) not in read]
        dtype = "i8" if node.op.name in _BYTE_PRODUCTS else self.precision if node.op.kind == "contraction" else "f32"
        return Layer(
            node.origin[0] if node.origin else node.output.name,
            node.op.name,
            flops,
            sum(self._bytes(v) for v in dict.fromkeys(operands) if v.data is not None),
            sum(self._bytes(v) for v in operands if v.data is None),
            node.op.kind in _FUSED_KINDS,
            dtype,
            ceil(flops * self._least_share(node)) if node.op.name == "conv" else None,
        )

    def _least_share(self, node: Node) -> Fraction:
        """Products that Winograd needs at least, over those of the definition (FEWEST)."""
        w, a = node.inputs[1], node.attrs
        assert w is not None
        stride = a["strides"][0]
        if a["group"] != 1 or any(s != stride for s in a["strides"]) or any(d != 1 for d in a["dilations"]):
            return Fraction(1)
        y, share = node.output.shape, Fraction(1)
        for taps, dim in zip(w.shape[2:], y[1:-1] if a["layout"] == "NHWC" else y[2:], strict=True):
            size = self._number(dim)
            if taps == N_TAPS and size:
                possible = (m for m in tile_sizes(stride) if m <= LARGEST_M)
                products = (-(-size // m) * n_inputs(m, stride) for m in possible)
                share *= min([Fraction(1), *(Fraction(n, N_TAPS * size) for n in products)])
        return share

    def _bytes(self, value: Value) -> int:
        n_bytes = self._number(value.type.bytes)
        return n_bytes // 2 if self.precision == "bf16" and value.dtype is DType.f32 else n_bytes

    def _number(self, dim: Dim) -> int:
        return evaluate(dim, {**{s.name: 1 for s in symbols(dim)}, **self.sizes})


def _work(work: Iterable[Layer]) -> int:
    """What branches are compared by."""
    return sum(layer.flops + layer.weight_bytes + layer.activation_bytes for layer in work)


def _counted(node: Node) -> list[Value]:
    """The operands and results whose elements are all read or written."""
    inputs, outputs = [v for v in node.inputs if v is not None], list(node.outputs)
    if node.op.name in _GATHERS:
        return inputs[1:] + outputs
    if node.op.name in _SCATTERS:
        return inputs[1:]
    if node.op.name == "tree_ensemble":
        return inputs[:1] + outputs
    return inputs + outputs


def limits(work: Iterable[Layer], peaks: Peaks, threads: int) -> Iterator[Limit]:
    """The least time of each layer at the peaks."""
    work = tuple(work)
    all_weight_bytes = sum(layer.weight_bytes for layer in work if not layer.is_fused)
    per_byte_s = peaks.read_seconds(all_weight_bytes, threads) / max(all_weight_bytes, 1)
    for layer in work:
        compute_s = layer.flops / peaks.operations(layer.dtype, threads)
        if layer.fewest_flops is not None:
            compute_s = min(compute_s, layer.fewest_flops / peaks.operations("f32", threads))
        transfer_s = 0.0
        if not layer.is_fused:
            transfer_s = layer.weight_bytes * per_byte_s + peaks.read_seconds(layer.activation_bytes, threads)
        yield Limit(layer, max(compute_s, transfer_s), "arithmetic" if compute_s >= transfer_s else "bytes")


@dataclass(frozen=True, slots=True)
class Total:
    """A whole model: its counted work and the least time that this machine needs for it."""

    flops: int
    weight_bytes: int
    activation_bytes: int
    seconds: float
    dtype: str  # of the fastest arithmetic that it uses

    def share(self, taken_seconds: float) -> float:
        """How near a measured time is to the limit: 1 is the limit."""
        return self.seconds / taken_seconds


def total(graph: Graph, sizes: Mapping[str, int], peaks: Peaks, threads: int, precision: str = "f32") -> Total:
    """Sums over all layers of a graph."""
    found = tuple(limits(layers(graph, sizes, precision), peaks, threads))
    return Total(
        sum(limit.layer.flops for limit in found),
        sum(limit.layer.weight_bytes for limit in found),
        sum(limit.layer.activation_bytes for limit in found),
        sum(limit.seconds for limit in found),
        max((limit.layer.dtype for limit in found), key=lambda dtype: peaks.operations(dtype, threads), default="f32"),
    )
