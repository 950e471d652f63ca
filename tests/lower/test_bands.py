"""Depthwise convolutions over low images: bands of rows, each with the taps that meet the image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from tests.lower.harness import BEST, build
from tests.lower.test_choices import random

from vivace.base.dims import Dim, symbol
from vivace.base.dtypes import DType
from vivace.base.machine import ISAS, with_extras
from vivace.building import apply_precision, link_image
from vivace.graph import reference
from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Type, Value
from vivace.loops.contraction import Depthwise
from vivace.lower.lowering import lower
from vivace.lower.plan import Plan, steps_of
from vivace.runtime.engine import Engine


@dataclass(frozen=True)
class Case:
    size: tuple[Dim, int, int]
    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    before: tuple[int, int] = (0, 0)
    after: tuple[int, int] = (0, 0)
    layout: str = "NHWC"
    images: int = 1

    def graph(self) -> Graph:
        """The convolution of what another step makes, plus an image, and ReLU."""
        height, width, c = self.size
        turned = self.layout == "NCHW"

        def shape(h: Dim, w: Dim) -> tuple[Dim, ...]:
            return (self.images, c, h, w) if turned else (self.images, h, w, c)

        def make(b: Builder, x: Value, y: Value) -> Value:
            weights, bias = b.const(random(c, 1, *self.kernel) / 3), b.const(random(c))
            made = b.conv(
                b.tanh(x), weights, bias, strides=self.strides, dilations=(1, 1), before=self.before, after=self.after,
                group=c, layout=self.layout,
            )  # fmt: skip
            return b.relu(b.add(made, y))

        padded = (d + p + q for d, p, q in zip((height, width), self.before, self.after))
        out = ((d - k) // s + 1 for d, k, s in zip(padded, self.kernel, self.strides))
        return build(make, Type(DType.f32, shape(height, width)), Type(DType.f32, shape(*out)))


LOW = {
    "3x": (Case((3, 9, 40), (5, 5), before=(2, 2), after=(2, 2), images=2), [(1, 3), (1, 3), (1, 3)]),
    "2x": (Case((2, 9, 17), (3, 5), before=(1, 2), after=(1, 2), layout="NCHW"), [(1, 2), (1, 2)]),
    "7x": (Case((7, 7, 48), (5, 5), before=(2, 2), after=(2, 2)), [(1, 3), (1, 4), (3, 5), (1, 4), (1, 3)]),
    "strided": (Case((6, 5, 32), (5, 3), (3, 2), (2, 0), (1, 2)), [(1, 3), (1, 5)]),
    "uneven": (Case((4, 8, 8), (3, 3), (2, 2), after=(1, 1)), [(1, 3), (1, 2)]),
    "one": (Case((1, 8, 16), (3, 1), before=(1, 0), after=(1, 0)), [(1, 1)]),
}
OTHER = {
    "high": Case((30, 7, 16), (3, 3), before=(1, 1), after=(1, 1)),
    "large": Case((3, 2000, 1000), (5, 5), before=(2, 2), after=(2, 2)),
    "few channels": Case((3, 9, 4), (5, 5), before=(2, 2), after=(2, 2)),
    "open": Case((symbol("H", 1), 7, 16), (5, 5), before=(2, 2), after=(2, 2)),
    "a row of padding only": Case((2, 7, 16), (2, 2), before=(3, 0), after=(0, 0)),
}


def parts(plan: Plan) -> list[tuple[Dim, Dim]]:
    """Rows of the results of depthwise steps, and rows of their taps."""
    specs = [s.spec for s in steps_of(plan.body)]
    return [(d.rows[1].extent, d.taps[0].extent) for d in specs if isinstance(d, Depthwise)]


@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize("name", LOW)
def test_low_images(name: str, precision: str) -> None:
    case, bands = LOW[name]
    wide, isa = case.graph(), ISAS[BEST]
    if precision == "bf16":
        if isa.name != "avx512":
            pytest.skip("needs AVX-512")
        isa = with_extras(isa, {"avx512_bf16"})
    graph, _ = apply_precision(wide, precision, isa)
    plan = lower(graph, isa)
    assert parts(plan) == bands
    given = [random(*(d for d in v.shape if isinstance(d, int))) for v in wide.inputs]
    got = Engine(link_image(plan, isa, False, None), 2)(*given)
    (want,) = reference.evaluate(wide, given)
    np.testing.assert_allclose(got, want, atol=1e-5 if precision == "f32" else 2e-2)


def test_bands_may_be_left_out() -> None:
    plan = lower(LOW["strided"][0].graph(), ISAS[BEST], frozenset({"bands"}))
    assert parts(plan) == [(2, 5)]


@pytest.mark.parametrize("name", OTHER)
def test_other_images_are_padded(name: str) -> None:
    plan = lower(OTHER[name].graph(), ISAS[BEST])
    assert all(rows != 1 for rows, _ in parts(plan)) and len(parts(plan)) <= 1
