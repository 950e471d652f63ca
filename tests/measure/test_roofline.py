"""Limits of layers at made-up peaks, and the page that shows kernels under the roof."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx.parser
import pytest

from vivace.base.dtypes import DType
from vivace.base.events import Event
from vivace.cli import bench
from vivace.cli.contestants import Job
from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Type
from vivace.graph.ops import OPS
from vivace.measure.peaks import Peak, Peaks
from vivace.measure.report import kernel_rows, to_html
from vivace.measure.roofline import Layer, layers, limits

LEVELS = (("L1", 32 << 10), ("L2", 1 << 20), ("L3", 32 << 20), ("memory", 0))


@pytest.fixture
def peaks() -> Peaks:
    """1000 operations per second; 100, 50, 20 and 10 bytes per second from near to far."""
    reads = [Peak("read", name, 1, rate) for (name, _), rate in zip(LEVELS, (100.0, 50.0, 20.0, 10.0), strict=True)]
    return Peaks("here", "avx2", LEVELS, (Peak("arithmetic", "f32", 1, 1000.0), *reads))


def test_bound_by_arithmetic_or_by_bytes(peaks: Peaks) -> None:
    heavy = Layer("a", "conv", 10_000, 100, 100, is_fused=False)
    light = Layer("b", "reduce", 10, 0, 500, is_fused=False)
    fused = Layer("c", "relu", 2_000, 0, 10**9, is_fused=True)
    found = list(limits([heavy, light, fused], peaks, 1))
    assert [limit.bound for limit in found] == ["arithmetic", "bytes", "arithmetic"]
    assert [limit.seconds for limit in found] == [10.0, 5.0, 2.0]


def test_weights_come_from_the_nearest_caches_that_hold_them(peaks: Peaks) -> None:
    """What two levels hold comes from both: the limit stays below any time, also with a few bytes too many."""
    sizes = dict(LEVELS)
    layer = Layer("a", "matmul", 0, sizes["L1"] + 1000, 0, is_fused=False)
    (found,) = limits([layer], peaks, 1)
    assert found.seconds == pytest.approx(sizes["L1"] / 100 + 1000 / 50)
    halves = list(limits([replace(layer, weight_bytes=layer.weight_bytes // 2)] * 2, peaks, 1))
    assert sum(half.seconds for half in halves) == pytest.approx(found.seconds)  # shared out evenly


def test_of_two_branches_the_smaller_counts() -> None:
    def branch(width: int) -> Graph:
        b = Builder()
        x = b.input("x", Type(DType.f32, (4, 8)))
        wide = b.matmul(x, b.const(np.ones((8, width), np.float32)))
        return b.finish([b.matmul(wide, b.const(np.ones((width, 2), np.float32)))])

    b = Builder()
    x, c = b.input("x", Type(DType.f32, (4, 8))), b.input("c", Type(DType.bool, ()))
    graph = b.finish(list(b.emit(OPS["if"], [c, x], {"then": branch(64), "else": branch(3)})))
    work = layers(graph, {})
    assert [layer.flops for layer in work] == [2 * 4 * 8 * 3, 2 * 4 * 3 * 2]
    assert sum(layer.weight_bytes for layer in work) == 4 * (8 * 3 + 3 * 2)


def test_a_weight_counts_once_and_a_table_by_its_rows() -> None:
    b = Builder()
    rows, w = b.input("rows", Type(DType.i64, (3,))), b.const(np.ones((1000, 8), np.float32))
    x = b.gather(w, rows, axis=0)
    wt = b.const(np.ones((8, 8), np.float32))
    graph = b.finish([b.matmul(b.matmul(x, wt), wt)])
    gather, first, again = layers(graph, {})
    assert (gather.weight_bytes, gather.activation_bytes) == (0, 3 * 8 + 3 * 8 * 4)
    assert (first.weight_bytes, again.weight_bytes) == (8 * 8 * 4, 0)
    halves = layers(graph, {}, "bf16")
    assert [(layer.dtype, layer.weight_bytes) for layer in halves] == [("f32", 0), ("bf16", 128), ("bf16", 0)]


@pytest.mark.parametrize(
    "taps, stride, share",
    [((3, 3), 1, Fraction(1, 4)), ((1, 3), 1, Fraction(1, 2)), ((3, 3), 2, Fraction(25, 36)), ((5, 5), 1, Fraction(1))],
)
def test_convolutions_count_with_the_fewest_products(
    peaks: Peaks, taps: tuple[int, int], stride: int, share: Fraction
) -> None:
    """F(4, 3) takes 6 products for 4 results of 3 taps, along each axis of 3 taps; at stride 2 it is 5 for 2."""
    b = Builder()
    pad, side = [t // 2 for t in taps], 16 * stride
    x, w = b.input("x", Type(DType.f32, (1, side, side, 128))), b.const(np.ones((128, 128, *taps), np.float32))
    y = b.conv(x, w, strides=(stride, stride), dilations=(1, 1), before=pad, after=pad, group=1, layout="NHWC")
    (layer,) = layers(b.finish([y]), {})
    assert layer.fewest_flops == layer.flops * share
    (found,) = limits([layer], peaks, 1)
    assert found.bound == "arithmetic" and found.seconds == int(layer.flops * share) / 1000


def test_kernel_rows_join_threads_runs_and_nodes(peaks: Peaks) -> None:
    def run(shift_ns: int) -> list[Event]:
        return [
            Event("1:relu", shift_ns + 900, 100, 40, 10, 0),
            Event("0:conv", shift_ns, 400, 100, 8000, 0),
            Event("0:conv", shift_ns + 100, 500, 100, 8000, 1),
        ]

    rows = kernel_rows([run(0), run(5000), run(10_000)], {"0:conv": ["/conv", "/bias"]}, peaks, 1)
    assert [row.kernel for row in rows] == ["0:conv", "1:relu"]
    assert rows[0].nodes == ("/conv", "/bias")
    assert rows[0].seconds == pytest.approx(600e-9)
    assert rows[0].limit_seconds == 8.0
    assert rows[1].nodes == ()
    page = to_html("a <model>", rows, peaks, 1)
    assert "a &lt;model&gt;" in page
    assert page.count("<circle") == 2
    assert "http" not in page.replace('xmlns="http://www.w3.org/2000/svg"', "")  # nothing is loaded from elsewhere


def test_the_limit_of_quantized_products_is_that_of_bytes(
    peaks: Peaks, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A QDQ model is held against what our own code computes of it: products of integers."""
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 13]>
        g (float[4, 8] x) => (float[4, 2] y)
        <float s = {0.1}, int8 z = {0}, int8[8, 2] w = {1,2,3,4,5,6,7,8,1,2,3,4,5,6,7,8}>
        { q = QuantizeLinear(x, s, z)  a = DequantizeLinear(q, s, z)  b = DequantizeLinear(w, s, z)
          m = MatMul(a, b)  p = QuantizeLinear(m, s, z)  y = DequantizeLinear(p, s, z) }
    """)
    onnx.save(model, tmp_path / "m.onnx")
    both = replace(peaks, peaks=(*peaks.peaks, Peak("arithmetic", "i8", 1, 8000.0)))
    monkeypatch.setattr("vivace.measure.peaks.machine_peaks", lambda progress: both)
    total, _ = bench._limit(Job(tmp_path / "m.onnx", 1), [], None)
    assert total is not None and total.dtype == "i8"
