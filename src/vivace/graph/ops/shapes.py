"""Shape rules shared by the families: broadcasting, axes, windows."""

from __future__ import annotations

from collections.abc import Sequence

from vivace.base.dims import Dim, floordiv
from vivace.base.errors import GraphError
from vivace.graph.graph import Type


class DimMismatch(GraphError):
    """Two dims must be equal and are not known to be; the importer may unify them when one is a bare symbol."""

    def __init__(self, a: Dim, b: Dim, where: str) -> None:
        self.a, self.b = a, b
        super().__init__(f"dims {a} and {b} must be equal", where=where)


def same(a: Dim, b: Dim, where: str) -> Dim:
    """The dim that both must be. Raises: DimMismatch."""
    if a != b:
        raise DimMismatch(a, b, where)
    return a


def broadcast(shapes: Sequence[tuple[Dim, ...]], where: str) -> tuple[Dim, ...]:
    """NumPy's broadcast of shapes. A symbolic dim is never taken for 1."""
    rank = max((len(s) for s in shapes), default=0)
    out: list[Dim] = []
    for i in range(rank):
        dims = [s[i - rank + len(s)] for s in shapes if i - rank + len(s) >= 0]
        wide = [d for d in dims if d != 1]
        for d in wide[1:]:
            same(wide[0], d, where)
        out.append(wide[0] if wide else 1)
    return tuple(out)


def axis_of(axis: int, rank: int, where: str) -> int:
    """A non-negative axis. Raises: GraphError when out of range."""
    if not -rank <= axis < rank:
        raise GraphError(f"axis {axis} is out of range for rank {rank}", where=where)
    return axis % rank


def window_out(size: Dim, kernel: Dim, stride: int, dilation: int, before: Dim, after: Dim) -> Dim:
    """Output size of a sliding window over a padded axis.

    Source: ONNX operator Conv, `floor((size + pads - dilation * (kernel - 1) - 1) / stride + 1)`.
    """
    return floordiv(size + before + after - dilation * (kernel - 1) - 1, stride) + 1


def need(types: Sequence[Type | None], i: int, where: str) -> Type:
    """Input `i`, which must be present."""
    if i >= len(types) or (t := types[i]) is None:
        raise GraphError(f"input {i} is missing", where=where)
    return t
