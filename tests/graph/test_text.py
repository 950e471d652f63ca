"""Graph text: what it looks like, the way back, and errors that name the line."""

from __future__ import annotations

import numpy as np
import pytest

from vivace.base.dims import symbol
from vivace.base.dtypes import DType
from vivace.base.errors import ModelError
from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Type
from vivace.graph.reference import evaluate
from vivace.graph.text import constants_of, parse_graph, parse_type, print_graph, print_node
from vivace.graph.verify import verify


def small() -> Graph:
    b = Builder(origin=("/fc/MatMul", "+fold_scale"))
    x = b.input("x", Type(DType.f32, (symbol("N", 1, 512), 4)))
    w = b.const(np.arange(12, dtype=np.float32).reshape(4, 3), name="w")
    half = b.const(np.float32(0.1), name="half")
    return b.finish([b.mul(b.matmul(x, w), half)])


def test_golden() -> None:
    assert print_graph(small()) == (
        "graph main(%x: f32[N,4]) {\n"
        "  dim N in 1..512\n"
        "  const %w: f32[4,3]\n"
        "  const %half: f32[] = 0.10000000149011612\n"
        "  %t1: f32[N,3] = matmul(%x, %w)  # /fc/MatMul; +fold_scale\n"
        "  %t2: f32[N,3] = mul(%t1, %half)  # /fc/MatMul; +fold_scale\n"
        "  return %t2\n"
        "}"
    )


def round_trip(graph: Graph) -> Graph:
    text = print_graph(graph)
    back = parse_graph(text, constants_of(graph))
    verify(back)
    assert print_graph(back) == text
    return back


def test_round_trip_keeps_bounds_origins_and_meaning() -> None:
    graph = small()
    back = round_trip(graph)
    assert back.inputs[0].type == graph.inputs[0].type
    assert back.nodes[0].origin == ("/fc/MatMul", "+fold_scale")
    x = np.ones((2, 4), np.float32)
    np.testing.assert_array_equal(evaluate(graph, [x])[0], evaluate(back, [x])[0])


def test_odd_constants_keep_their_bits() -> None:
    b = Builder()
    x = b.input("x", Type(DType.f32, (4,)))
    odd = b.const(np.array([np.nan, -np.inf, -0.0, 1e-45], np.float32), name="odd")
    y = b.where(b.const(np.array([True, False, True, False])), b.add(x, odd), odd)
    back = round_trip(b.finish([y, b.cast(b.const(np.array([2**63 - 1, -5])), to=DType.f64)]))
    got = next(v for v in back.constants() if v.name == "odd")
    assert got.data is not None
    assert got.data.tobytes() == np.array([np.nan, -np.inf, -0.0, 1e-45], np.float32).tobytes()


def test_attributes_of_every_kind() -> None:
    b = Builder()
    n, m = symbol("N"), symbol("M")
    x = b.input("x", Type(DType.f32, (n, m)))
    y = b.slice(x, starts=(0, 1), sizes=(n, (m - 1) // 2), steps=(1, 2))
    z = b.pad(y, before=(0, 1), after=(n * m + 1, 0), mode="constant", value=-1.5)
    w = b.clip(z, min=None, max=6.0)
    k = b.iota(shape=(n, 3), axis=0, dtype=DType.i64)
    round_trip(b.finish([w, k, b.dims(values=(n, 4, 2 * n + 1))]))


def test_names_that_are_no_words() -> None:
    b = Builder()
    x = b.input('a:0 "quoted" \\ ü', Type(DType.bool, ()))
    round_trip(b.finish([b.not_(x)]))


def test_equal_names_print_apart() -> None:
    b = Builder()
    x, y = (b.input("x", Type(DType.f32, (2,))) for _ in range(2))
    back = round_trip(b.finish([b.sub(x, y)]))
    assert [v.name for v in back.inputs] == ["x", "x.2"]


def nested() -> Graph:
    branches = []
    for scale in (2.0, 3.0):
        inner = Builder()
        x = inner.input("x", Type(DType.f32, (9,)))
        branches.append(inner.finish([inner.mul(x, inner.const(np.full(9, scale, np.float32), name="w"))], "branch"))
    b = Builder()
    cond, x = b.input("cond", Type(DType.bool, ())), b.input("x", Type(DType.f32, (9,)))
    return b.finish([b.if_(cond, x, then=branches[0], **{"else": branches[1]})])


def test_nested_graphs_keep_their_own_constants() -> None:
    back = round_trip(nested())
    x = np.ones(9, np.float32)
    assert evaluate(back, [np.array(True), x])[0][0] == 2
    assert evaluate(back, [np.array(False), x])[0][0] == 3


def test_absent_inputs_print_as_none() -> None:
    b = Builder()
    x = b.input("x", Type(DType.f32, (2, 4)))
    bias = b.input("b", Type(DType.f32, (4,)))
    y = b.layer_norm(x, None, bias, axis=1, epsilon=1e-5)
    graph = b.finish([y])
    assert "layer_norm{axis=1, epsilon=1e-05}(%x, none, %b)" in print_node(graph.nodes[0])
    round_trip(graph)


def test_parse_type() -> None:
    assert parse_type("f32[N,2*M+1,64]") == Type(DType.f32, (symbol("N"), 2 * symbol("M") + 1, 64))


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("graph g(%x: f32[2]) {\n  %y: f32[2] = relu(%z)\n  return %y\n}", 2, "%z is used before it is defined"),
        ("graph g(%x: f32[2]) {\n  %y: f32[2] = rulu(%x)\n  return %y\n}", 2, "unknown op"),
        ("graph g(%x: f33[2]) {\n  return %x\n}", 1, "unknown dtype"),
        ("graph g(%x: f32[2]) {\n  const %c: f32[9]\n  return %c\n}", 2, "the data of constant %c are missing"),
        ("graph g(%x: f32[2]) {\n  const %c: f32[2] = [1, 2, 3]\n  return %c\n}", 2, "constant"),
        ("graph g(%x: f32[2]) {\n  return %x\n} more", 3, "after the end"),
        ("graph g(%x: f32[2]) {\n  return %x", 2, "found"),
    ],
)
def test_errors_name_the_line(text: str, line: int, said: str) -> None:
    with pytest.raises(ModelError) as caught:
        parse_graph(text)
    assert f"line {line} " in str(caught.value)
    assert said in str(caught.value)
