"""Results over operands: where it is done, where it must not be, and that the answers stay (see the harness)."""

from __future__ import annotations

import numpy as np
import pytest
from tests.lower.harness import build, check

from vivace.base.dims import symbol
from vivace.base.dtypes import DType
from vivace.base.machine import ISAS
from vivace.building import make_plan
from vivace.graph.build import Builder
from vivace.graph.graph import Type, Value
from vivace.lower.in_place import write_in_place
from vivace.lower.lowering import lower
from vivace.lower.plan import Plan
from vivace.options import choose_isa

SQUARE = Type(DType.f32, (24, 24))
rng = np.random.default_rng(0)
W = (rng.standard_normal((24, 24)) / 5).astype(np.float32)


def n_shared(plan: Plan) -> int:
    """How many steps write over what they read."""
    return sum(bool(set(s.reads) & set(s.writes)) for s in plan.body)  # type: ignore[union-attr]


def product(b: Builder, x: Value) -> Value:
    return b.matmul(x, b.const(W))


def test_a_residual_is_written_over() -> None:
    graph = build(lambda b, x: product(b, b.add(product(b, product(b, x)), product(b, b.exp(x)))), SQUARE)
    plan = check(graph, rng.standard_normal((24, 24)).astype(np.float32), tol=1e-4)
    assert n_shared(plan) == 1
    apart = lower(graph, ISAS["avx2"])
    assert len(write_in_place(apart).storages) == len(apart.storages) - 1


def test_a_chain_of_residuals_stays_in_one_place() -> None:
    def make(b: Builder, x: Value) -> Value:
        h = product(b, x)
        for _ in range(4):
            h = b.relu(b.add(product(b, product(b, h)), h))
        return product(b, h)

    plan = check(build(make, SQUARE), rng.standard_normal((24, 24)).astype(np.float32), tol=1e-3)
    assert n_shared(plan) == 4
    assert sum(s.kind == "arena" for s in plan.storages) == 5  # that place, and what each inner product gives


@pytest.mark.parametrize("channels", [8, 16])
def test_convolutions_of_any_size(channels: int) -> None:
    """Rows of 8 numbers fill no vector, and stay apart."""
    n, h = symbol("N"), symbol("H")
    same = {"strides": (1, 1), "dilations": (1, 1), "before": (1, 1), "after": (1, 1), "group": 1, "layout": "NHWC"}
    w = (rng.standard_normal((channels, channels, 3, 3)) / 9).astype(np.float32)
    deep = (rng.standard_normal((channels, 1, 3, 3)) / 3).astype(np.float32)

    def make(b: Builder, x: Value) -> Value:
        y = b.conv(x, b.const(w), **same)
        for k in (w, deep):
            group = {**same, "group": channels if k is deep else 1}
            y = b.relu(b.add(b.conv(b.conv(y, b.const(w), **same), b.const(k), **group), y))
        return b.conv(y, b.const(w), **same)

    graph = build(make, Type(DType.f32, (n, h, 9, channels)))
    plan = check(graph, rng.standard_normal((2, 7, 9, channels)).astype(np.float32), tol=1e-4)
    assert (n_shared(plan) >= 1) == (channels == 16)


@pytest.mark.parametrize(
    "make",
    [
        # read again later
        lambda b, x: b.add(product(b, b.add(product(b, b.exp(x)), r := product(b, x))), b.tanh(r)),
        # A as well as the residual
        lambda b, x: product(b, b.add(product(b, r := product(b, x)), r)),
        # another element of the operand
        lambda b, x: product(b, b.add(product(b, b.exp(x)), b.transpose(product(b, x), perm=(1, 0)))),
        # an input of the caller
        lambda b, x: product(b, b.add(product(b, b.exp(x)), x)),
        # an output of the caller
        lambda b, x: [r := product(b, x), product(b, b.add(product(b, b.exp(x)), r))],
    ],
    ids=["later", "twice", "elsewhere", "input", "output"],
)
def test_what_must_stay_apart(make) -> None:  # type: ignore[no-untyped-def]
    plan = check(build(make, SQUARE), rng.standard_normal((24, 24)).astype(np.float32), tol=1e-3)
    assert n_shared(plan) == 0


def test_it_can_be_left_out() -> None:
    graph = build(lambda b, x: product(b, b.add(product(b, product(b, x)), product(b, b.exp(x)))), SQUARE)
    made = [make_plan(graph, choose_isa("host"), ("native",), frozenset(names)) for names in ((), ("in_place",))]
    assert [n_shared(plan) for plan in made] == [1, 0]
