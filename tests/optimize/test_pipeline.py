"""The pipeline as a whole: levels, disabling, dumps, explanations, broken passes, and the generated page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vivace.base.dtypes import DType
from vivace.base.errors import GraphError, InputError, InternalError
from vivace.base.knobs import knobs
from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Type, Value
from vivace.graph.passes import Pass, run_passes
from vivace.graph.rewrite import Example
from vivace.graph.text import parse_graph, print_graph
from vivace.optimize.pipeline import PIPELINE, Level, optimize, rule_names
from vivace.optimize.report import Report
from vivace.optimize.rulebook import render_rules


def small() -> Graph:
    def make(e: Example) -> Value:
        x = e.x("f32[N,3,8,8]")
        y = e.conv(
            x,
            e.w("f32[4,3,3,3]"),
            strides=(1, 1),
            dilations=(1, 1),
            before=(1, 1),
            after=(1, 1),
            group=1,
            layout="NCHW",
        )
        y = e.mul(y, e.w("f32[4,1,1]"))
        return e.mul(y, e.sigmoid(y))

    return Example().graph(make)


def ops(graph: Graph) -> list[str]:
    return [n.op.name for n in graph.nodes]


def test_levels_include_one_another() -> None:
    graph = small()
    assert optimize(graph, Level.DISABLE) is graph
    assert ops(optimize(graph, Level.BASIC)) == ["conv", "sigmoid", "mul"]
    assert ops(optimize(graph, Level.EXTENDED)) == ["conv", "silu"]
    assert ops(optimize(graph, Level.LAYOUT)) == ["transpose", "conv", "silu", "transpose"]
    assert ops(optimize(graph, Level.ALL)) == ops(optimize(graph, Level.LAYOUT))
    assert ops(optimize(graph, "extended")) == ops(optimize(graph, 2))


def test_levels_and_names_that_do_not_exist_are_refused() -> None:
    with pytest.raises(InputError, match="unknown level 4"):
        optimize(small(), 4)
    with pytest.raises(InputError, match="nothing is called 'fuse_silly'"):
        optimize(small(), disable=("fuse_silly",))


@pytest.mark.parametrize("name", ["fuse_silu", "fuse"])
def test_rules_and_passes_can_be_disabled(name: str) -> None:
    assert name in rule_names()
    assert "silu" not in ops(optimize(small(), Level.EXTENDED, disable=(name,)))


def test_graph_is_only_read() -> None:
    graph = small()
    text = print_graph(graph)
    optimize(graph)
    assert print_graph(graph) == text


def test_optimizing_twice_changes_nothing_more() -> None:
    once = optimize(small())
    assert ops(optimize(once)) == ops(once)


def test_report_counts_rules_nodes_and_bytes() -> None:
    report = Report()
    optimize(small(), Level.EXTENDED, report=report)
    assert report.fired == {"scale_into_conv": 1, "fuse_silu": 1}
    assert (report.ops_before.total(), report.ops_after.total()) == (4, 2)
    assert report.bytes_after < report.bytes_before
    assert "1 x fuse_silu" in str(report)
    assert report.seconds > 0


def test_explain_tells_near_misses() -> None:
    def shared(e: Example) -> tuple[Value, Value]:
        s = e.sigmoid(e.x("f32[4]"))
        return e.mul(e.inputs[0], s), s

    report = Report(explain=("fuse_silu",))
    optimize(Example().graph(shared), report=report)
    assert any(n.startswith("fuse_silu did not fire: %t1 is used elsewhere too") for n in report.notes)


def test_explain_knob_prints_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with knobs.scope(explain="fuse_silu"):
        optimize(small())
    assert "fuse_silu fired at " in capsys.readouterr().err
    with knobs.scope(explain="fuse_silly"), pytest.raises(InputError, match="nothing is called 'fuse_silly'"):
        optimize(small())


def test_dump_writes_every_stage_and_it_can_be_read_back(tmp_path: Path) -> None:
    with knobs.scope(dump=str(tmp_path)):
        result = optimize(small(), Level.EXTENDED)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names[0] == "00-imported.txt"
    assert len(names) == 1 + sum(p.level <= Level.EXTENDED for p in PIPELINE)
    assert (tmp_path / "01-remove_dead.unchanged").exists()
    text = (tmp_path / "04-fuse.txt").read_text()
    stage = parse_graph(text, {"c1": np.zeros((4, 3, 3, 3), np.float32)})
    assert ops(stage)[-1] == "silu"
    assert ops(result) == ["conv", "silu"]


def broken(graph: Graph, log: object) -> Graph:
    return replace(graph, nodes=graph.nodes[::-1])


def test_a_pass_that_breaks_the_graph_is_named_and_the_graph_saved(tmp_path: Path) -> None:
    with pytest.raises(GraphError) as caught:
        run_passes(small(), [Pass("turn_around", "", 1, function=broken)], dump=tmp_path)
    assert "pass turn_around broke the graph" in str(caught.value)
    assert "silu" not in (tmp_path / "bad-turn_around.txt").read_text()
    with pytest.raises(GraphError, match="saved as") as caught:
        run_passes(small(), [Pass("turn_around", "", 1, function=broken)])
    saved = Path(str(caught.value).split("saved as ")[1].split(": ")[0])
    assert saved.read_text().startswith("graph ")
    saved.unlink()


def test_order_of_passes_is_checked() -> None:
    late = Pass("late", "", 1, rules=(), requires=frozenset({"simple"}))
    with pytest.raises(InternalError, match="pass late needs simple"):
        run_passes(small(), [late])


@pytest.mark.parametrize("level", [Level.BASIC, Level.EXTENDED, Level.LAYOUT, Level.ALL])
def test_every_level_meets_what_its_passes_require(level: Level) -> None:
    optimize(small(), level)


@pytest.mark.parametrize("name", [p.name for p in PIPELINE])
def test_any_pass_can_be_left_out_and_takes_along_what_needs_it(name: str) -> None:
    done = optimize(small(), disable=(name,))
    assert [v.type for v in done.outputs] == [v.type for v in small().outputs]


def test_big_constants_are_not_made() -> None:
    def make(e: Example) -> Value:
        return e.expand(e.exp(e.const(np.float32(1))), shape=(1000, 1000))

    result = optimize(Example().graph(make))
    assert ops(result) == ["expand"]


def test_nested_graphs_are_optimized_and_known_conditions_followed() -> None:
    def branch(scale: float) -> Graph:
        b = Builder()
        x = b.input("x", Type(DType.f32, (4,)))
        return b.finish([b.neg(b.neg(b.mul(x, b.const(np.float32(scale)))))])

    b = Builder()
    cond, x = b.input("cond", Type(DType.bool, ())), b.input("x", Type(DType.f32, (4,)))
    known = b.if_(b.const(np.bool_(False)), x, then=branch(2), **{"else": branch(3)})
    result = optimize(b.finish([b.if_(cond, known, then=branch(4), **{"else": branch(5)})]))
    assert ops(result) == ["mul", "if"]
    assert [ops(g) for g in result.nodes[1].attrs.values()] == [["mul"], ["mul"]]


def test_equal_computations_are_shared_but_outputs_stay_apart() -> None:
    def make(e: Example) -> tuple[Value, ...]:
        x = e.x("f32[4]")
        return e.exp(x), e.exp(x), e.neg(e.add(e.abs(x), e.abs(x)))

    result = optimize(Example().graph(make))
    assert sorted(ops(result)) == ["abs", "add", "exp", "exp", "neg"]


def test_page_of_rules_is_up_to_date(repository: Path) -> None:
    page = repository / "docs" / "rules.md"
    assert page.read_text(encoding="utf-8") == render_rules(), "run `make docs` and commit docs/rules.md"
