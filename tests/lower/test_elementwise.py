"""Every element-wise op of the family against its own record: a new one is compared without being listed, unless it
has attributes or takes no f32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests import tolerance
from tests.lower.harness import BEST, build, run_plan

from vivace.base.dtypes import DType
from vivace.base.errors import GraphError
from vivace.base.machine import isa
from vivace.graph import reference
from vivace.graph.graph import Op, Type
from vivace.graph.ops.elementwise import FAMILY
from vivace.lower.lowering import lower

ATTRS: dict[str, dict[str, Any]] = {
    "leaky_relu": {"alpha": 0.25}, "hard_sigmoid": {"alpha": 0.2, "beta": 0.5}, "clip": {"min": -1.0, "max": 1.5},
    "gelu": {"approximate": "tanh"}, "cast": {"to": DType.f64}, "mod": {"fmod": True},
}  # fmt: skip
DTYPES = {
    **dict.fromkeys(("not", "and", "or", "xor"), DType.bool),
    **dict.fromkeys(("bitnot", "bitand", "bitor", "bitxor"), DType.i32),
    **dict.fromkeys(("shl", "shr"), DType.u32),
}
SPECIAL = (np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, -1e-40, 0.5, -0.5, 2.5, 88.0, -104.0, 3e38)
N = 67  # vectors of any width, and a tail


def types(op: Op) -> list[Type]:
    """As many operands as it takes, of a type that it takes."""
    kind = Type(DTYPES.get(op.name, DType.f32), (N,))
    if op.name == "where":
        return [Type(DType.bool, (N,)), kind, kind]
    try:
        op.infer([kind], ATTRS.get(op.name, {}))
    except GraphError:
        return [kind, kind]
    return [kind]


def numbers(kind: Type, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind.dtype is DType.bool:
        return rng.random(N) < 0.5
    if kind.dtype is DType.u32:
        return rng.integers(0, 32, N).astype(np.uint32)
    if kind.dtype is DType.i32:
        return rng.integers(-(2**31), 2**31, N).astype(np.int32)
    x = (3 * rng.standard_normal(N)).astype(np.float32)
    x[rng.permutation(N)[: len(SPECIAL)]] = SPECIAL
    return x


@pytest.mark.parametrize("op", FAMILY, ids=[op.name for op in FAMILY])
def test_means_what_the_record_says(op: Op) -> None:
    kinds = types(op)
    graph = build(lambda b, *xs: b.emit(op, xs, ATTRS.get(op.name, {})), *kinds)
    feeds = [numbers(kind, 3 + i) for i, kind in enumerate(kinds)]
    (want,) = reference.evaluate(graph, feeds)
    (got,) = run_plan(lower(graph, isa(BEST)), feeds, {}, BEST)
    assert got.dtype == want.dtype
    if want.dtype.kind == "f":
        bound = op.tolerance * (1 + np.abs(want)) if not op.exact else 0.0
        assert not tolerance.agree(got, want, bound)
    else:
        np.testing.assert_array_equal(got, want)
