"""Padding, against the graph's reference: by copies of the operand's own cells, and around what is written in place."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.lower.harness import build, check

import vivace
from vivace.base.dims import symbol
from vivace.base.dtypes import DType
from vivace.base.machine import ISAS
from vivace.graph.build import Builder
from vivace.graph.graph import Type, Value
from vivace.lower.plan import steps_of
from vivace.targets.cpu.codegen import emit

Extents = tuple[int, ...]


@pytest.mark.parametrize("mode", ["reflect", "edge", "wrap"])
@pytest.mark.parametrize(
    "shape, before, after",
    [((9,), (4,), (3,)), ((2, 7, 20), (0, 3, 2), (0, 0, 5)), ((1, 5, 6, 3), (0, 2, 4, 0), (0, 4, 1, 0))],
)
@pytest.mark.parametrize("symbolic", [False, True])
def test_pad(mode: str, shape: Extents, before: Extents, after: Extents, symbolic: bool) -> None:
    b = Builder()
    dims = tuple(symbol(f"d{i}", 1) for i in range(len(shape))) if symbolic else shape
    x = b.input("x", Type(DType.f32, dims))
    graph = b.finish([b.pad(x, before=before, after=after, mode=mode, value=0.0)])
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    want = np.pad(values, tuple(zip(before, after)), mode)
    got = vivace.compile(graph, threads=1, cache=False).run({"x": values})
    np.testing.assert_array_equal(next(iter(got.values())), want)


@pytest.mark.parametrize("size", [(9, 11), (1, 64), (20, 40)])
def test_images_of_halves_are_interleaved_into_padded_pixels(size: tuple[int, int]) -> None:
    """Three planes of an image become pixels of four halves: by vectors, not element by element."""
    shape = (1, 3, *size)
    around = {"before": (0, 1, 1, 0), "after": (0, 0, 1, 1), "mode": "constant", "value": 0.0}

    def make(b: Builder, x: Value) -> Value:
        return b.pad(b.cast(b.transpose(x, perm=(0, 2, 3, 1)), to=DType.bf16), **around)

    x = np.random.default_rng(0).integers(-8, 9, shape).astype(np.float32)
    plan = check(build(make, Type(DType.f32, shape)), x)
    (turned,) = [s.spec for s in steps_of(plan.body) if s.label == "cast"]
    text = emit(replace(turned, name="k"), ISAS["avx512"]).llvm_text  # type: ignore[type-var]
    is_short = size[1] < 16  # a last vector of less than four is stored one by one
    assert is_short or ("shufflevector" in text and "scatter" not in text)
