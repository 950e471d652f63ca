"""The verifier finds every way to break a graph, and says where."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vivace.base.dtypes import DType
from vivace.base.errors import GraphError
from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Type, Value, freeze
from vivace.graph.verify import verify


def graph() -> Graph:
    b = Builder()
    x = b.input("x", Type(DType.f32, (2, 3)))
    return b.finish([b.relu(b.neg(b.exp(x)))])


def refused(bad: Graph, said: str) -> str:
    with pytest.raises(GraphError) as caught:
        verify(bad, where="after a_pass")
    assert said in str(caught.value)
    assert "after a_pass" in str(caught.value)
    return str(caught.value)


def test_accepts_a_good_graph() -> None:
    verify(graph())


def test_use_before_definition() -> None:
    g = graph()
    text = refused(replace(g, nodes=g.nodes[::-1]), "used before it is defined")
    assert "> %t" in text  # the line is marked among its neighbours


def test_wrong_type() -> None:
    g = graph()
    wrong = replace(g.nodes[1], outputs=(Value("n", Type(DType.f16, (2, 3))),))
    refused(replace(g, nodes=(g.nodes[0], wrong), outputs=wrong.outputs), "neg gives f32[2,3], the graph says f16[2,3]")


def test_attributes_that_do_not_fit() -> None:
    b = Builder()
    x = b.input("x", Type(DType.f32, (2, 3)))
    g = b.finish([b.transpose(x, perm=(1, 0))])
    bad = replace(g.nodes[0], attrs=freeze({"perm": (0, 0)}))
    refused(replace(g, nodes=(bad,)), "no permutation")


def test_defined_twice() -> None:
    g = graph()
    refused(replace(g, nodes=(*g.nodes, g.nodes[-1])), "defined twice")


def test_input_listed_twice() -> None:
    g = graph()
    refused(replace(g, inputs=g.inputs * 2), "twice among the inputs")


def test_output_without_a_maker() -> None:
    g = graph()
    refused(replace(g, outputs=(Value("lost", Type(DType.f32, (2,))),)), "output %lost is never defined")


def test_looks_into_nested_graphs() -> None:
    good = graph()
    bad = replace(good, nodes=good.nodes[::-1])
    b = Builder()
    cond, x = b.input("c", Type(DType.bool, ())), b.input("x", Type(DType.f32, (2, 3)))
    y = b.if_(cond, x, then=good, **{"else": bad})
    refused(b.finish([y]), "used before it is defined")
