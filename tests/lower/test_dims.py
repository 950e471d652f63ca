"""What lowering demands of the dims of a model."""

from __future__ import annotations

import numpy as np
import pytest
from tests.lower.harness import BEST, build, check

from vivace.base.dims import symbol
from vivace.base.dtypes import DType
from vivace.base.errors import UnsupportedError
from vivace.base.machine import ISAS
from vivace.graph.build import Builder
from vivace.graph.graph import Type, Value
from vivace.lower.lowering import lower

f32 = DType.f32


@pytest.mark.parametrize("name", ["n", "b", "i0", "k", "m0", "s", "u", "d", "len", "at", "c", "batch", "N"])
def test_a_dim_may_have_the_name_of_a_loop(name: str) -> None:
    n = symbol(name, 1)

    def make(b: Builder, x: Value, y: Value, w: Value) -> list[Value]:
        return [
            b.relu(b.matmul(x, y)),
            b.sin(x),
            b.argmax(x, axis=1, keepdims=False, select_last=False),
            b.gather(x, w, axis=0),
        ]

    graph = build(make, Type(f32, (n, 5)), Type(f32, (5, n)), Type(DType.i64, (n,)))
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((7, 5)).astype(np.float32), rng.standard_normal((5, 7)).astype(np.float32)
    check(graph, x, y, np.arange(7), isas=(BEST,))


def test_a_size_that_no_input_determines_is_refused() -> None:
    graph = build(lambda b, x: b.expand(b.sin(x), shape=(symbol("unknown", 0), 3)), Type(f32, (1, 3)))
    with pytest.raises(UnsupportedError, match="unknown"):
        lower(graph, ISAS[BEST])
