"""Which masks become `causal`, and which look like it and do not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from vivace.base.dtypes import DType
from vivace.graph.graph import Graph, Value
from vivace.graph.reference import evaluate
from vivace.graph.rewrite import Example, rewrite
from vivace.optimize.check import random_inputs
from vivace.optimize.rules.causal import causal_mask

S, T = 3, 5
MIN = float(np.finfo(np.float32).min)


def attention(e: Example, mask: Callable[[Example], Value], s: int = S, t: int = T) -> Value:
    q, k, v = e.x(f"f32[2,4,{s},8]"), e.x(f"f32[2,2,{t},8]"), e.x(f"f32[2,2,{t},8]")
    return e.attention(q, k, v, mask(e), scale=0.3, causal=False, softcap=0.0)


def rows(e: Example, s: int = S, plus: int = 0) -> Value:
    line = e.reshape(e.iota(shape=(s,), axis=0, dtype=DType.i64), shape=(s, 1))
    return e.add(line, e.const(np.int64(plus))) if plus else line


def columns(e: Example, t: int = T) -> Value:
    return e.reshape(e.iota(shape=(1, t), axis=1, dtype=DType.i64), shape=(1, 1, 1, t))


def added(e: Example, seen: Value, hidden: float = MIN, turned: bool = False) -> Value:
    values = e.const(np.float32(0)), e.const(np.float32(hidden))
    return e.where(seen, *(reversed(values) if turned else values))


def spread(e: Example, x: Value) -> Value:
    return e.expand(x, shape=(2, 1, *x.shape[-2:]))


def is_causal(graph: Graph) -> bool:
    result = rewrite(graph, [causal_mask])
    for want, got in zip(*(evaluate(g, random_inputs(graph, {}, 0)) for g in (graph, result)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    (node,) = [n for n in result.nodes if n.op.name == "attention"]
    assert bool(node.attrs["causal"]) == (len(node.inputs) == 3)
    return bool(node.attrs["causal"])


YES: dict[str, Callable[[Example], Value]] = {
    "le": lambda e: e.le(columns(e), rows(e, plus=2)),
    "lt": lambda e: e.lt(columns(e), rows(e, plus=3)),
    "ge": lambda e: e.ge(rows(e, plus=2), columns(e)),
    "shifted columns": lambda e: e.gt(rows(e), e.add(columns(e), e.const(np.int64(-3)))),
    "not": lambda e: getattr(e, "not")(e.gt(columns(e), rows(e, plus=2))),
    "added": lambda e: added(e, e.le(columns(e), rows(e, plus=2))),
    "added, turned": lambda e: added(e, e.gt(columns(e), rows(e, plus=2)), -np.inf, turned=True),
    "spread": lambda e: spread(e, added(e, e.le(columns(e), rows(e, plus=2)))),
    "spread condition": lambda e: added(e, spread(e, e.le(columns(e), rows(e, plus=2)))),
    "constant": lambda e: e.const(np.tri(S, T, 2, dtype=bool)[None]),
}  # fmt: skip
NO: dict[str, Callable[[Example], Value]] = {
    "one key too far": lambda e: e.le(columns(e), rows(e, plus=3)),
    "no offset": lambda e: e.le(columns(e), rows(e)),
    "the other way": lambda e: e.ge(columns(e), rows(e, plus=2)),
    "equal": lambda e: e.eq(columns(e), rows(e, plus=2)),
    "not hidden enough": lambda e: added(e, e.le(columns(e), rows(e, plus=2)), -100.0),
    "a bias where seen": lambda e: e.add(added(e, e.le(columns(e), rows(e, plus=2))), e.const(np.float32(1))),
    "also a padding": lambda e: e.add(added(e, e.le(columns(e), rows(e, plus=2))), e.x("f32[2,1,1,5]")),
    "constant, one key too few": lambda e: e.const(np.tri(S, T, 1, dtype=bool)),
    "constant with a hole": lambda e: e.const(np.tri(S, T, 2, dtype=bool) & (np.arange(T) != 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", YES)
def test_becomes_causal(name: str) -> None:
    assert is_causal(Example().graph(lambda e: attention(e, YES[name])))


@pytest.mark.parametrize("name", NO)
def test_stays_a_mask(name: str) -> None:
    assert not is_causal(Example().graph(lambda e: attention(e, NO[name])))


@pytest.mark.parametrize(("hidden", "becomes"), [(-np.inf, True), (MIN, False)])
def test_a_query_that_sees_nothing(hidden: float, becomes: bool) -> None:
    """-inf makes its row NaN, as `causal` does; a finite number gives equal weights."""

    def mask(e: Example) -> Value:
        return added(e, e.le(columns(e, 3), rows(e, 5, plus=-2)), hidden)

    assert is_causal(Example().graph(lambda e: attention(e, mask, 5, 3))) == becomes
