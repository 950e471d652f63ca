"""The kernels behind the peaks compute what they claim, without spills; the table of peaks answers for any threads."""

from __future__ import annotations

import ctypes
import re

import numpy as np
import pytest

from vivace.base.cache import Cache
from vivace.base.errors import InputError
from vivace.base.machine import ISAS, host, missing_flags
from vivace.measure.peaks import _FORMAT, Peak, Peaks, _is_disturbed, _Task, machine_peaks
from vivace.targets.cpu.amx import host_isa
from vivace.targets.cpu.jit import assembly
from vivace.targets.cpu.peaks import arithmetic_text, arithmetics, n_operations, peak_kernels, stream_text

here = pytest.mark.parametrize("name", [name for name, isa in ISAS.items() if not missing_flags(host(), isa)])


@pytest.mark.parametrize("name", list(ISAS))
def test_arithmetic_stays_in_registers(name: str) -> None:
    isa = ISAS[name]
    for kind in arithmetics(isa)[:2]:
        code = assembly(arithmetic_text(kind, isa), isa, "none")
        assert "rsp" not in code
        assert len(re.findall(r"\tvfmadd|\tmul[ps]", code)) == 48


@here
def test_arithmetic_computes_its_recurrence(name: str) -> None:
    kernels = peak_kernels(ISAS[name])
    buffer = np.zeros(16 * 16 + 16, np.float32)
    aligned = buffer[-buffer.ctypes.data % 64 // 4 :][: 16 * 14].reshape(14, 16)
    aligned[0], aligned[1], aligned[2:] = 0.5, 3.0, 1.0
    kind, call = kernels.arithmetic[0]
    call(aligned.ctypes.data, 1, 4096)
    want = 1.0
    for _ in range(4):  # a repeat unrolls four steps
        want = want * 0.5 + 3.0
    lanes = ISAS[name].n_f32_lanes
    np.testing.assert_array_equal(aligned[2:, :lanes], np.full((12, lanes), want, np.float32))
    assert n_operations(kind, 10) == 2 * lanes * 12 * 4 * 10


@here
def test_copy_moves_half_of_the_buffer(name: str) -> None:
    buffer = np.arange(4 * 4096 + 64, dtype=np.uint8)
    aligned = buffer[-buffer.ctypes.data % 64 :][: 4 * 4096]
    first = aligned[: 2 * 4096].copy()
    peak_kernels(ISAS[name]).copy(aligned.ctypes.data, 2, aligned.nbytes)
    np.testing.assert_array_equal(aligned[: 2 * 4096], first)
    np.testing.assert_array_equal(aligned[2 * 4096 :], first)


@here
def test_read_adds_every_vector(name: str) -> None:
    isa = ISAS[name]
    lanes, n_bytes = isa.n_f32_lanes, 8192
    buffer = np.zeros(n_bytes // 4 + 16, np.int32)
    aligned = buffer[-buffer.ctypes.data % 64 // 4 :][: n_bytes // 4]
    aligned[:] = np.arange(n_bytes // 4)
    want = aligned.reshape(-1, 8, lanes).sum(0)
    peak_kernels(isa).read(aligned.ctypes.data, 1, n_bytes)
    np.testing.assert_array_equal(aligned[: 8 * lanes].reshape(8, lanes), want)


def test_texts_of_streams_differ() -> None:
    isa = host_isa()
    assert "store" in stream_text("c", isa, is_copy=True).split("loop:")[1].split("next:")[0]
    assert ctypes.sizeof(ctypes.c_void_p) == 8


def _peaks() -> Peaks:
    levels = (("L1", 32 << 10), ("L2", 1 << 20), ("L3", 32 << 20), ("memory", 0))
    rows = [("arithmetic", "f32", 1, 100.0), ("arithmetic", "f32", 4, 400.0)]
    rows += [("read", name, 1, rate) for (name, _), rate in zip(levels, (1e6, 1e5, 1e4, 1e3), strict=True)]
    return Peaks("here", "avx2", levels, tuple(Peak(*row) for row in rows))


def test_peaks_by_threads() -> None:
    peaks = _peaks()
    assert peaks.operations("f32", 1) == 100.0
    assert peaks.operations("f32", 2) == 200.0
    assert peaks.operations("f32", 4) == peaks.operations("f32", 8) == 400.0
    with pytest.raises(InputError, match="f99"):
        peaks.operations("f99", 1)


def test_bytes_come_from_the_nearest_levels_that_hold_them() -> None:
    peaks, (l1, l2, l3) = _peaks(), (32 << 10, 1 << 20, 32 << 20)
    assert peaks.read_seconds(0, 1) == 0
    assert peaks.read_seconds(l1, 1) == pytest.approx(l1 / 1e6)
    assert peaks.read_seconds(l1 + 7, 1) == pytest.approx(l1 / 1e6 + 7 / 1e5)
    assert peaks.read_seconds(l1 + l2 + l3 + 7, 1) == pytest.approx(l1 / 1e6 + l2 / 1e5 + l3 / 1e4 + 7 / 1e3)
    assert peaks.read_seconds(4 * (l1 + l2), 4) == pytest.approx(4 * (l1 / 1e6 + l2 / 1e5))  # private caches add up


def test_a_nearer_level_is_never_left_out_where_the_machine_has_none() -> None:
    levels = (("L1", 32 << 10), ("L2", 1 << 20), ("memory", 0))
    peaks = Peaks("here", "avx2", levels, _peaks().peaks)
    assert peaks.read_seconds(10 << 20, 1) > (8 << 20) / 1e3


def test_peaks_are_read_back_from_the_cache(tmp_path) -> None:  # type: ignore[no-untyped-def]
    store = Cache(tmp_path, 1 << 20)
    peaks = _peaks()
    assert Peaks.from_json(peaks.to_json()) == peaks
    machine, isa = host(), host_isa()
    store.put("peaks", f"{_FORMAT} {machine.fingerprint()} {isa.name} 4", peaks.to_json().encode())
    assert machine_peaks(4, store=store) == peaks


@pytest.mark.parametrize("one, two, disturbed", [(470.0, 935.0, False), (470.0, 700.0, True), (201.1, 905.2, True)])
def test_rates_that_contradict_each_other_are_disturbed(one: float, two: float, disturbed: bool) -> None:
    """Two cores that do far more than twice what one did: the one was disturbed when it was measured alone."""
    tasks = [_Task("arithmetic", "i8", n, lambda *_: None, 64, 1) for n in (1, 2)]
    assert any(_is_disturbed(tasks, [one, two])) is disturbed
