"""Limits of layers at made-up peaks, and the page that shows kernels under the roof."""

from __future__ import annotations

import pytest

from vivace.base.events import Event
from vivace.measure.peaks import Peak, Peaks
from vivace.measure.report import kernel_rows, to_html
from vivace.measure.roofline import Layer, limits

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
    assert [limit.bound for limit in found] == ["arithmetic", "L1", "arithmetic"]
    assert [limit.seconds for limit in found] == [10.0, 5.0, 2.0]


def test_weights_come_from_where_all_of_them_lie(peaks: Peaks) -> None:
    layers = [Layer(str(i), "matmul", 0, 512 << 10, 0, is_fused=False) for i in range(4)]
    assert {limit.bound for limit in limits(layers, peaks, 1)} == {"L3"}
    assert {limit.bound for limit in limits(layers[:1], peaks, 1)} == {"L2"}


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
