"""What lowering demands of the dims of a model."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
from tests.lower.harness import BEST, build, check

from vivace.base.dims import symbol
from vivace.base.dtypes import DType
from vivace.base.errors import UnsupportedError
from vivace.base.machine import ISAS
from vivace.graph.build import Builder
from vivace.graph.graph import Type, Value
from vivace.lower.lowering import LOOP_NAME, lower

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


@pytest.mark.parametrize("name", ["image", "row4", "last"])
def test_a_dim_may_have_the_name_of_a_position(name: str) -> None:
    """Positions that kernels of Winograd's products and of sorting have names for."""
    n = symbol(name, 8)

    def make(b: Builder, x: Value) -> list[Value]:
        w = b.const(np.random.default_rng(1).standard_normal((32, 16, 3, 3)).astype(np.float32) / 12)
        same = {"strides": (1, 1), "dilations": (1, 1), "before": (0, 0), "after": (0, 0), "group": 1}
        return [b.relu(b.conv(x, w, **same, layout="NHWC")), *b.topk(x, k=3, axis=2, largest=True, sorted=True)]

    graph = build(make, Type(f32, (n, n, n, 16)))
    x = np.random.default_rng(0).standard_normal((9, 9, 9, 16)).astype(np.float32)
    check(graph, x, isas=(BEST,))


def test_two_names_stay_two() -> None:
    n, m = symbol("n", 1), symbol("dim_n", 1)
    graph = build(lambda b, x, y: b.matmul(x, y), Type(f32, (n, m)), Type(f32, (m, n)))
    x, y = np.ones((2, 5), np.float32), np.ones((5, 2), np.float32)
    check(graph, x, y, isas=(BEST,))


def test_every_name_inside_kernels_is_known_to_hide_dims(repository: Path) -> None:
    given = {"symbol": 0, "Axis": 0, "For": 0, "Let": 0, "vector": 0, "loop_symbol": 0, "Reduce": 1}
    names = set()
    for path in [*(repository / "src/vivace/lower").rglob("*.py"), repository / "src/vivace/loops/contraction.py"]:
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in given:
                match call.args[given[call.func.id] :]:
                    case [ast.Constant(value=str(name)), *_]:
                        names.add(name)
                    case [ast.JoinedStr(values=[ast.Constant(), *_] as parts), *_]:
                        names.add("".join(str(x.value) if isinstance(x, ast.Constant) else "0" for x in parts))
    names -= {"", "dim_0"}
    assert len(names) > 50
    assert [name for name in sorted(names) if not LOOP_NAME.fullmatch(name)] == []


def test_a_size_that_no_input_determines_is_refused() -> None:
    graph = build(lambda b, x: b.expand(b.sin(x), shape=(symbol("unknown", 0), 3)), Type(f32, (1, 3)))
    with pytest.raises(UnsupportedError, match="unknown"):
        lower(graph, ISAS[BEST])
