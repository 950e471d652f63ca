"""Products of two quantized values as products of bf16.

Tolerance: integers are multiplied and summed exactly below 2**24; the scales round three times in f32, as often as the
reference does.
"""

from __future__ import annotations

import numpy as np
import pytest
from tests.images import build_image
from tests.lower.harness import build

from vivace.base.dims import Dim, symbol
from vivace.base.dtypes import DType
from vivace.base.machine import isa
from vivace.graph import reference
from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Type, Value
from vivace.loops.contraction import Contraction
from vivace.lower.lowering import lower
from vivace.lower.plan import steps_of
from vivace.runtime.engine import Engine
from vivace.targets.cpu.amx import missing_here

FAST = ("avx512+avx512_bf16", "avx512+amx_bf16+amx_tile+avx512_bf16")
HERE = [name for name in ("avx2", *FAST) if not missing_here(isa(name).flags)]
each_isa = pytest.mark.parametrize("name", HERE)
U8, I8 = DType.u8, DType.i8


def product(
    a: tuple[Dim, ...], b: tuple[Dim, ...], types: tuple[DType, DType], zeros: tuple[int, int], scale: object = 0.02,
    perm: tuple[int, ...] | None = None,
) -> Graph:  # fmt: skip
    def make(g: Builder, x: Value, y: Value) -> Value:
        y = y if perm is None else g.transpose(y, perm=perm)
        wide = [
            g.dequantize(v, g.const(np.asarray(s, np.float32)), g.const(np.asarray(z, t.numpy)))
            for v, s, z, t in zip((x, y), (scale, 0.3), zeros, types, strict=True)
        ]
        return g.matmul(*wide)

    return build(make, Type(types[0], a), Type(types[1], b))


def factors(graph: Graph, name: str) -> list[DType]:
    return [s.spec.a.dtype for s in steps_of(lower(graph, isa(name)).body) if isinstance(s.spec, Contraction)]


def run(graph: Graph, name: str, *xs: np.ndarray) -> None:
    (want,) = reference.evaluate(graph, list(xs))
    engine = Engine(build_image(graph, isa(name), False), 2, [])
    got = engine.run({v.name: x for v, x in zip(graph.inputs, xs, strict=True)})[graph.outputs[0].name]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max(initial=0))


def numbers(dtype: DType, *shape: int) -> np.ndarray:
    limits = np.iinfo(dtype.numpy)
    return np.random.default_rng(5).integers(limits.min, limits.max + 1, shape).astype(dtype.numpy)


@each_isa
@pytest.mark.parametrize("types", [(U8, U8), (U8, I8), (I8, I8)])
@pytest.mark.parametrize("zeros", [(0, 0), (127, 3), (0, 127)])
@pytest.mark.parametrize(("m", "k", "n"), [(16, 64, 32), (33, 20, 70), (128, 300, 64), (17, 1, 1)])
def test_any_sizes_and_zero_points(
    name: str, types: tuple[DType, DType], zeros: tuple[int, int], m: int, k: int, n: int
) -> None:
    graph = product((2, m, k), (2, k, n), types, zeros)
    assert factors(graph, name) == [DType.bf16 if name in FAST else DType.f32]
    run(graph, name, numbers(types[0], 2, m, k), numbers(types[1], 2, k, n))


@each_isa
@pytest.mark.parametrize("zero", [0, 255])
def test_extremes_are_exact(name: str, zero: int) -> None:
    """The largest magnitudes that bytes have, 255, in all terms of a sum."""
    graph = product((1, 32, 256), (1, 256, 32), (U8, U8), (zero, zero))
    run(graph, name, np.full((1, 32, 256), 255 - zero, np.uint8), np.full((1, 256, 32), 255 - zero, np.uint8))


@each_isa
def test_a_transposed_factor_and_a_batch_known_at_run_time(name: str) -> None:
    n = symbol("n", 0)
    graph = product((n, 40, 48), (n, 33, 48), (U8, I8), (128, 0), perm=(0, 2, 1))
    for size in (0, 1, 3):
        run(graph, name, numbers(U8, size, 40, 48), numbers(I8, size, 33, 48))


@each_isa
def test_what_stays_f32(name: str) -> None:
    """Few rows, which packing would not pay for, and scales that differ."""
    assert factors(product((2, 3, 32), (2, 32, 32), (U8, U8), (1, 1)), name) in ([], [DType.f32])
    scale = np.full((2, 1, 1), 0.1)
    zeros = (np.ones((2, 1, 1)), 1)
    assert DType.bf16 not in factors(product((2, 20, 32), (2, 32, 32), (U8, U8), zeros, scale), name)  # type: ignore[arg-type]
