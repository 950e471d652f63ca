"""What follows products, where it takes several basic blocks; tile kernels compile also where they cannot run."""

from __future__ import annotations

import numpy as np
import pytest
from tests.lower.harness import HERE, build, check
from tests.lower.test_blockwise import weights
from tests.lower.test_choices import random
from tests.targets.test_contraction_amx import TILES

from vivace.base.dims import symbol
from vivace.base.dtypes import DType
from vivace.building import apply_precision, link_image
from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Type, Value
from vivace.lower.lowering import lower


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("name", ["sin", "cos"])
def test_sines_of_sums(name: str, isa: str) -> None:
    """Large numbers are brought near 0 in a branch of their own."""

    def depthwise(b: Builder, x: Value) -> Value:
        made = b.conv(
            x, b.const(random(40, 1, 3, 3)), strides=(1, 1), dilations=(1, 1), before=(1, 1), after=(1, 1), group=40,
            layout="NHWC",
        )  # fmt: skip
        return getattr(b, name)(made)

    x = 30 * random(1, 9, 16, 40)
    check(build(depthwise, Type(DType.f32, x.shape)), x, isas=(isa,), tol=2e-4)

    def product(b: Builder, x: Value) -> Value:
        return getattr(b, name)(b.matmul(x, b.const(random(24, 40))))

    x = 30 * random(7, 24)
    check(build(product, Type(DType.f32, x.shape)), x, isas=(isa,), tol=2e-4)


def sine_of_a_product() -> Graph:
    return build(lambda b, x: b.sin(b.matmul(x, b.const(random(128, 64)))), Type(DType.f32, (symbol("S"), 128)))


def blocks(n_more: int) -> Graph:
    """Two products with block-wise weights; of the first, more or less follows."""
    b = Builder()
    y = b.matmul_blocks(b.input("x", Type(DType.f32, (symbol("S"), 96))), *weights(96, 64, 4, 32, "whole"), block=32)
    for _ in range(n_more):
        y = b.tanh(y)
    return b.finish([b.matmul_blocks(y, *weights(64, 70, 8, 32, "none"), block=32)])


@pytest.mark.parametrize("graph", [sine_of_a_product(), blocks(0), blocks(1), blocks(8)], ids=["sine", "0", "1", "8"])
def test_tile_kernels_are_valid_text(graph: Graph) -> None:
    narrow, _ = apply_precision(graph, "bf16", TILES)
    image = link_image(lower(narrow, TILES), TILES, False, None)
    assert any(np.size(code) for code in image.objects)
