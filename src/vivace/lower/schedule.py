"""From a plan to a line of instructions: what runs beside what, what is too small to share out, and how long each storage lives.

Rules:
* BESIDE: neighbouring steps of which none reads what another writes share one barrier. (Two may write one storage: then they
  write different parts of it, since every element is written once.)
* SERIAL: a step whose estimated time is below `SERIAL_NS` runs on one thread: waking and meeting would cost more than they save.
* MOMENT: everything that shares a barrier happens at one moment; lifetimes are counted in moments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vivace.base.dims import Dim, Expr, substitute, symbols
from vivace.lower.plan import Branch, Foreign, Instruction, Operand, Plan, Step
from vivace.lower.views import Storage, View

SERIAL_NS = 2_000  # handing a step over costs about 0.1 us, but its data then comes from the other core's cache
GUESS = 64  # for symbolic dims, in estimates only
FLOPS_PER_NS, BYTES_PER_NS = 50.0, 10.0


@dataclass(frozen=True, slots=True)
class Line:
    """One instruction in line. `kind` is run, unless, jump or foreign; `target` the index of the line to jump to."""

    kind: str
    step: Step | None = None
    foreign: Foreign | None = None
    cond: Operand | None = None
    target: int = -1
    serial: bool = False
    beside: bool = False


@dataclass(frozen=True, slots=True)
class Schedule:
    """The lines, and for each arena storage its first and last moment."""

    lines: tuple[Line, ...]
    lifetimes: dict[Storage, tuple[int, int]]


def estimate_ns(flops: int, n_bytes: int) -> float:
    """A rough time of a step on one core: only for deciding what is worth sharing."""
    return max(flops / FLOPS_PER_NS, n_bytes / BYTES_PER_NS)


def _guess(d: Dim) -> int:
    if isinstance(d, Expr):
        d = substitute(d, {s.name: GUESS for s in symbols(d)})
    return d if isinstance(d, int) else 0


def schedule(plan: Plan) -> Schedule:
    """Put a plan's instructions in line."""
    lines: list[Line] = []
    _append(lines, plan.body)
    return Schedule(tuple(lines), _lifetimes(lines))


def _append(lines: list[Line], body: Sequence[Instruction]) -> None:
    reads: set[Storage] = set()
    writes: set[Storage] = set()
    for item in body:
        match item:
            case Step():
                serial = estimate_ns(_guess(item.flops), _guess(item.bytes)) < SERIAL_NS
                beside = (
                    not serial
                    and bool(writes)
                    and not writes.intersection(item.reads)
                    and not reads.intersection(item.writes)
                )
                if not beside:
                    reads, writes = set(), set()
                if not serial:
                    reads |= set(item.reads)
                    writes |= set(item.writes)
                lines.append(Line("run", step=item, serial=serial, beside=beside))
            case Foreign():
                reads, writes = set(), set()
                lines.append(Line("foreign", foreign=item))
            case Branch():
                reads, writes = set(), set()
                at = len(lines)
                lines.append(Line("unless", cond=item.cond))
                _append(lines, item.then)
                jump = len(lines)
                lines.append(Line("jump"))
                lines[at] = Line("unless", cond=item.cond, target=len(lines))
                _append(lines, item.otherwise)
                lines[jump] = Line("jump", target=len(lines))


def _lifetimes(lines: Sequence[Line]) -> dict[Storage, tuple[int, int]]:
    found: dict[Storage, tuple[int, int]] = {}
    moment = 0

    def touch(s: Storage | None) -> None:
        if s is not None and s.kind == "arena":
            first, _ = found.get(s, (moment, moment))
            found[s] = (first, moment)

    def touch_view(v: View | None) -> None:
        touch(None if v is None else v.storage)

    for line in lines:
        if not line.beside:
            moment += 1
        if line.step is not None:
            for o in line.step.operands:
                touch(o.storage)
        if line.cond is not None:
            touch(line.cond.storage)
        if line.foreign is not None:
            for v in (*line.foreign.inputs, *line.foreign.outputs):
                touch_view(v)
    return found
