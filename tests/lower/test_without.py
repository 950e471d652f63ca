"""What a user may switch off in the lowering: the results stay, the kernels become more."""

from __future__ import annotations

import numpy as np
import pytest
from tests.lower.harness import BEST, run_plan

from vivace.base.dtypes import DType
from vivace.base.machine import ISAS
from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Type
from vivace.lower.lowering import OPTIONS, lower
from vivace.lower.plan import steps_of

X = (1, 10, 10, 32)


def a_bit_of_everything() -> Graph:
    """A 3x3 convolution with an epilogue, a tree, and two operands of a concatenation."""
    rng = np.random.default_rng(0)
    b = Builder()
    x = b.input("x", Type(DType.f32, X))
    w = b.const(rng.standard_normal((32, 32, 3, 3)).astype(np.float32) / 17)
    ones, pads = (1, 1), (1, 1)
    y = b.relu(b.conv(x, w, None, strides=ones, dilations=ones, before=pads, after=pads, group=1, layout="NHWC"))
    return b.finish([b.concat(y, b.tanh(b.add(b.mul(x, x), b.exp(b.neg(x)))), axis=3)])


def n_steps(graph: Graph, *without: str) -> int:
    return len(list(steps_of(lower(graph, ISAS[BEST], frozenset(without)).body)))


@pytest.mark.parametrize(("option", "n_more"), [("winograd", 0), ("epilogues", 1), ("trees", 4), ("placement", 2)])
def test_an_option_that_is_off_changes_the_kernels_and_not_the_results(option: str, n_more: int) -> None:
    graph, x = a_bit_of_everything(), np.random.default_rng(1).standard_normal(X).astype(np.float32)
    want = run_plan(lower(graph, ISAS[BEST]), [x], {}, BEST)[0]
    got = run_plan(lower(graph, ISAS[BEST], frozenset({option})), [x], {}, BEST)[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)  # Winograd rounds otherwise
    assert n_steps(graph, option) - n_steps(graph) == n_more


def test_every_option_has_a_test() -> None:
    assert set(OPTIONS) == {
        "winograd",
        "epilogues",
        "trees",
        "placement",
        "strips",
        "row_blocks",
        "in_place",
        "slices",
        "bands",
        "gathered_rows",
        "shared_rows",
    }  # `test_strips.py`, `test_row_blocks.py`, `test_in_place.py`, `test_slices.py`, `test_bands.py`,
    # `test_precision.py` and `test_blockwise.py` have the others
    labels = [s.label for s in steps_of(lower(a_bit_of_everything(), ISAS[BEST], frozenset({"winograd"})).body)]
    assert not any("winograd" in label for label in labels)
