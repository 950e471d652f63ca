"""The rewrite engine: matching, its promises about names, types, origins and rest, and reasons for near misses."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vivace.base.dtypes import DType
from vivace.base.errors import GraphError, InternalError
from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Node, Type
from vivace.graph.ops import OPS
from vivace.graph.pattern import pattern
from vivace.graph.rewrite import At, Example, Log, Outcome, rewrite, rule
from vivace.graph.verify import verify

X = Type(DType.f32, (2, 3))

double_neg = pattern("double_neg", lambda op, x: op.neg(op.neg(x)), lambda op, x: x, sample=("f32[2,3]",), shared=True)
square_root = pattern(
    "square_root",
    lambda op, x: op.sqrt(op.mul(x, op.scalar("c", 4.0))),
    lambda op, x, c: op.mul(op.sqrt(x), float(np.sqrt(c))),
    when=lambda c: None if c > 0 else "the factor is not positive",
)


def build(make) -> Graph:  # type: ignore[no-untyped-def]
    return Example().graph(make)


def ops(graph: Graph) -> list[str]:
    return [n.op.name for n in graph.nodes]


def test_unchanged_graph_is_the_same_object() -> None:
    g = build(lambda e: e.relu(e.x("f32[2]")))
    assert rewrite(g, [double_neg]) is g


def test_graph_is_not_changed_in_place() -> None:
    g = build(lambda e: e.exp(e.neg(e.neg(e.x("f32[2]")))))
    nodes = g.nodes
    h = rewrite(g, [double_neg])
    assert g.nodes is nodes
    assert ops(g) == ["neg", "neg", "exp"]
    assert ops(h) == ["exp"]
    verify(h)


def test_when_gives_a_reason() -> None:
    g = build(lambda e: e.sqrt(e.mul(e.x("f32[2]"), -4.0)))
    log = Log(explain=("square_root",))
    assert rewrite(g, [square_root], log) is g
    assert log.notes == ["square_root did not fire: the factor is not positive at " + str(g.nodes[1])]


def test_near_miss_names_the_deepest_difference() -> None:
    g = build(lambda e: e.sqrt(e.add(e.x("f32[2]"), 4.0)))
    log = Log(explain=("square_root",))
    rewrite(g, [square_root], log)
    assert "is made by add, not by mul" in log.notes[0]


def test_nodes_inside_a_match_may_have_no_other_reader() -> None:
    def shared(e: Example):  # type: ignore[no-untyped-def]
        inner = e.mul(e.x("f32[2]"), 4.0)
        return e.add(e.sqrt(inner), inner)

    log = Log(explain=("square_root",))
    g = build(shared)
    assert rewrite(g, [square_root], log) is g
    assert "used elsewhere" in log.notes[0]


def test_commutative_operands_match_in_both_orders() -> None:
    for flip in (False, True):
        g = build(
            lambda e, flip=flip: e.sqrt(
                e.mul(e.const(np.float32(4)), e.x("f32[2]")) if flip else e.mul(e.x("f32[2]"), 4.0)
            )
        )
        assert ops(rewrite(g, [square_root])) == ["sqrt", "mul"]


triple = pattern(
    "triple",
    lambda op, x, y, z: op.mul(op.exp(x), op.neg(y), op.abs(z)),
    lambda op, x, y, z: op.add(op.add(x, y), z),
    sample=("f32[2]",) * 3,
)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
@pytest.mark.parametrize("left", [True, False])
def test_product_of_three_in_any_order_and_association(order: tuple[int, int, int], left: bool) -> None:
    def make(e: Example):  # type: ignore[no-untyped-def]
        parts = [e.exp(e.x("f32[2]")), e.neg(e.x("f32[2]")), e.abs(e.x("f32[2]"))]
        a, b, c = (parts[i] for i in order)
        return e.mul(e.mul(a, b), c) if left else e.mul(a, e.mul(b, c))

    assert ops(rewrite(build(make), [triple])) == ["add", "add"]


def test_any_number_of_operands() -> None:
    first = pattern(
        "first",
        lambda op: op.concat(op.each("xs"), axis=op.attr("axis", 0)),
        lambda op, xs, axis: op.concat(*xs[::-1], axis=axis),
    )
    g = build(lambda e: e.concat(e.x("f32[2]"), e.x("f32[3]"), e.x("f32[4]"), axis=0))
    fired = Log()
    with pytest.raises(InternalError):  # reversing never comes to rest, and is caught
        rewrite(g, [first], fired)
    assert fired.fired["first"] > 100


def test_alternatives_bind_none_for_the_other() -> None:
    either = pattern(
        "either",
        lambda op, x, b: op.exp(op.either(op.add(op.neg(x), b), op.neg(x))),
        lambda op, x, b: op.sqrt(x) if b is None else op.sqrt(op.sub(x, b)),
        sample=("f32[2]", "f32[2]"),
        choices=2,
    )
    assert ops(rewrite(build(lambda e: e.exp(e.neg(e.x("f32[2]")))), [either])) == ["sqrt"]
    assert ops(rewrite(build(lambda e: e.exp(e.add(e.neg(e.x("f32[2]")), e.x("f32[2]")))), [either])) == ["sub", "sqrt"]


def test_equal_constants_are_one_variable() -> None:
    twice = pattern(
        "twice",
        lambda op, x, c: op.add(op.mul(x, c), c),
        lambda op, x, c: op.mul(op.add(x, 1), c),
        sample=("f32[2]",) * 2,
    )
    g = build(lambda e: e.add(e.mul(e.x("f32[2]"), e.const(np.float32([3, 4]))), e.const(np.float32([3, 4]))))
    assert ops(rewrite(g, [twice])) == ["add", "mul"]


def test_outputs_keep_their_names() -> None:
    b = Builder()
    x = b.input("x", X)
    (inner,) = b.emit(OPS["exp"], (x,), {}, ("inner",))
    (out,) = b.emit(OPS["neg"], (b.neg(inner),), {}, ("result",))
    h = rewrite(b.finish([out]), [double_neg])
    assert ops(h) == ["exp"]
    assert [v.name for v in h.outputs] == ["result"]
    verify(h)


def test_an_output_never_becomes_an_alias_of_an_input() -> None:
    g = build(lambda e: e.neg(e.neg(e.x("f32[2]"))))
    log = Log(explain=("double_neg",))
    assert rewrite(g, [double_neg], log) is g
    assert "alias" in log.notes[1]


def test_two_outputs_never_become_one() -> None:
    def make(e: Example):  # type: ignore[no-untyped-def]
        y = e.exp(e.x("f32[2]"))
        return y, e.neg(e.neg(y))

    g = build(make)
    assert rewrite(g, [double_neg]) is g


def test_wrong_type_names_the_rule() -> None:
    @rule("relu")
    def to_half(n: Node, at: At) -> Outcome:
        """relu(x) = cast(x)"""
        return at.op.cast(n.inputs[0], to=DType.f16)

    with pytest.raises(GraphError, match="rule to_half replaces"):
        rewrite(build(lambda e: e.relu(e.x("f32[2]"))), [to_half])


def test_pattern_of_another_type_declines() -> None:
    wide = pattern("wide", lambda op, x: op.mul(x, op.scalar("c")), lambda op, x, c: op.neg(x))
    g = build(lambda e: e.mul(e.x("f32[2]"), e.const(np.ones((1, 1), np.float32))))
    log = Log(explain=("wide",))
    assert rewrite(g, [wide], log) is g
    assert "the replacement would be f32[2], not f32[1,2]" in log.notes[0]


def test_origins_are_those_of_the_nodes_that_died() -> None:
    b = Builder()
    x = b.input("x", X)
    b.origin = ("/a",)
    y = b.mul(x, b.const(np.float32(4)))
    b.origin = ("/b",)
    h = rewrite(b.finish([b.sqrt(y)]), [square_root])
    assert {n.origin for n in h.nodes} == {("/a", "/b", "+square_root")}


def test_rules_reach_nested_graphs() -> None:
    inner = Builder()
    branch = inner.finish([inner.exp(inner.neg(inner.neg(inner.input("x", X))))])
    b = Builder()
    cond, x = b.input("c", Type(DType.bool, ())), b.input("x", X)
    log = Log()
    h = rewrite(b.finish([b.if_(cond, x, then=branch, **{"else": branch})]), [double_neg], log)
    assert Counter(n.op.name for n in h.walk()) == {"if": 1, "exp": 2}
    assert log.fired["double_neg"] == 2
    verify(h)


def test_order_of_untouched_nodes_is_kept() -> None:
    def make(e: Example):  # type: ignore[no-untyped-def]
        x = e.x("f32[2]")
        a, b, c = e.exp(x), e.abs(x), e.neg(e.neg(x))
        return e.add(c, b), e.log(a)

    assert ops(rewrite(build(make), [double_neg])) == ["exp", "abs", "add", "log"]
