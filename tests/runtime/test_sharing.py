"""How many threads a run takes."""

from __future__ import annotations

from vivace.base.dims import Dim, symbol
from vivace.lower.image import BYTES_PER_NS, FLOPS_PER_NS, KernelEntry, LineEntry
from vivace.runtime.sharing import MEETING_NS, WAKE_NS, Sharing


def line(work_ns: float, *, serial: bool = False, beside: bool = False) -> LineEntry:
    return LineEntry("run", kernel=0, serial=serial, beside=beside, n_bytes=round(BYTES_PER_NS * work_ns))


def sharing(lines: list[LineEntry], units: Dim = 8, grain: Dim = 2) -> Sharing:
    """Of lines that all run one kernel."""
    return Sharing(lines, [KernelEntry("k", (), units, grain, 0)])


def test_small_steps_stay_on_one_thread_and_large_ones_are_shared() -> None:
    least = 2 * MEETING_NS + 2 * WAKE_NS / 50
    assert sharing([line(0.9 * least)] * 50).threads({}, 2) == 1
    assert sharing([line(1.1 * least)] * 50).threads({}, 2) == 2
    assert sharing([line(1.1 * least)] * 50).threads({}, 1) == 1


def test_one_step_must_be_worth_the_waking() -> None:
    assert sharing([line(2 * WAKE_NS)]).threads({}, 2) == 1
    assert sharing([line(2 * WAKE_NS + 3 * MEETING_NS)]).threads({}, 2) == 2


def test_more_threads_bring_more() -> None:
    lines = [line(1.5 * MEETING_NS + 2 * WAKE_NS / 50)] * 50
    assert [sharing(lines).threads({}, n) for n in (2, 8)] == [1, 8]


def test_steps_side_by_side_meet_once_and_serial_ones_are_not_shared() -> None:
    work = 1.2 * MEETING_NS + WAKE_NS
    assert sharing([line(work), line(work)]).threads({}, 2) == 1
    assert sharing([line(work), line(work, beside=True)]).threads({}, 2) == 2
    assert sharing([line(1e9, serial=True), LineEntry("jump")]).threads({}, 2) == 1


def test_sizes_decide() -> None:
    of_n = LineEntry("run", kernel=0, flops=symbol("N") * 1000)
    enough = round(2 * (WAKE_NS + MEETING_NS) * FLOPS_PER_NS / 1000)
    assert [sharing([of_n]).threads({"N": n}, 2) for n in (1, enough - 1, enough + 1)] == [1, 1, 2]


def test_steps_of_one_piece_meet_nobody() -> None:
    n, large = symbol("N"), line(4 * WAKE_NS)
    lines = [LineEntry("run", kernel=1)] * 100 + [large]
    some = Sharing(lines, [KernelEntry("k", (), 8, 2, 0), KernelEntry("tiny", (), n, 4, 0)])
    assert [some.threads({"N": size}, 2) for size in (1, 4, 5)] == [2, 2, 1]
    assert sharing([large], units=2).threads({}, 2) == 1
    halves = [line(2 * WAKE_NS), line(2 * WAKE_NS, beside=True)]
    assert sharing(halves, units=2).threads({}, 2) == 2
