"""Padding by copies of the operand's own cells, against the graph's reference."""

from __future__ import annotations

import numpy as np
import pytest

import vivace
from vivace.base.dims import symbol
from vivace.base.dtypes import DType
from vivace.graph.build import Builder
from vivace.graph.graph import Type

Extents = tuple[int, ...]


@pytest.mark.parametrize("mode", ["reflect", "edge", "wrap"])
@pytest.mark.parametrize(
    "shape, before, after",
    [((9,), (4,), (3,)), ((2, 7, 20), (0, 3, 2), (0, 0, 5)), ((1, 5, 6, 3), (0, 2, 4, 0), (0, 4, 1, 0))],
)
@pytest.mark.parametrize("symbolic", [False, True])
def test_pad(mode: str, shape: Extents, before: Extents, after: Extents, symbolic: bool) -> None:
    b = Builder()
    dims = tuple(symbol(f"d{i}", 1) for i in range(len(shape))) if symbolic else shape
    x = b.input("x", Type(DType.f32, dims))
    graph = b.finish([b.pad(x, before=before, after=after, mode=mode, value=0.0)])
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    want = np.pad(values, tuple(zip(before, after)), mode)
    got = vivace.compile(graph, threads=1, cache=False).run({"x": values})
    np.testing.assert_array_equal(next(iter(got.values())), want)
