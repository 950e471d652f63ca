"""Normalizations: rows that are computed together, as far as their number allows."""

from __future__ import annotations

import numpy as np
import pytest
from tests.lower.harness import build, check

from vivace.base.dims import Dim, symbol
from vivace.base.dtypes import DType
from vivace.base.machine import ISAS
from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Type, Value
from vivace.loops.kernel import For, Kernel
from vivace.lower.lowering import lower

N = symbol("N", 0)


def normalized(kind: str, *shape: Dim) -> Graph:
    def make(b: Builder, x: Value) -> Value:
        scale = b.const(np.linspace(-1, 2, 40, dtype=np.float32))
        return b.relu(getattr(b, kind)(x, scale, axis=len(shape), epsilon=1e-5))

    return build(make, Type(DType.f32, (*shape, 40)))


def turns(graph: Graph) -> Dim:
    """Of the loop over the last axis of rows."""
    (step,) = lower(graph, ISAS["avx512"]).body
    loop = step.spec.body  # type: ignore[union-attr]
    assert isinstance(step.spec, Kernel)  # type: ignore[union-attr]
    while isinstance(loop[0], For) and isinstance(loop[0].body[0], For):
        loop = loop[0].body
    assert isinstance(loop[0], For)
    return loop[0].extent


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_an_even_number_of_rows_is_computed_in_pairs(kind: str) -> None:
    assert turns(normalized(kind, 6)) == 3
    assert turns(normalized(kind, 7)) == 7
    assert turns(normalized(kind, N)) == N
    rng = np.random.default_rng(0)
    for shape in ((6,), (7,), (0,), ()):
        x = rng.standard_normal((*shape, 40)).astype(np.float32)
        check(normalized(kind, *shape), x)
