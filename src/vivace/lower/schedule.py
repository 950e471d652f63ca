"""From a plan to a line of instructions: what runs beside what, what is too small to share out, and how long each
storage lives.

Rules:
* BESIDE: neighbouring steps of which none reads what another writes share one barrier. (Two may write one storage:
  then they write different parts of it, since every element is written once.)
* SERIAL: a step whose estimated time is below `SERIAL_NS` runs on one thread: waking and meeting would cost more than
  they save.
* MOMENT: everything that shares a barrier happens at one moment; lifetimes are counted in moments.
* TURN: what a loop reads from before it, and what it carries from turn to turn, lives through the whole loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vivace.base.dims import Dim, Expr, substitute, symbols
from vivace.lower.image import estimate_ns
from vivace.lower.plan import Branch, Demand, Foreign, Instruction, Loop, Operand, Plan, Step
from vivace.lower.views import Storage

SERIAL_NS = 2_000  # handing a step over costs about 0.1 us, but its data then comes from the other core's cache
GUESS = 64  # for symbolic dims, in estimates only


@dataclass(frozen=True, slots=True)
class Line:
    """One instruction in line; `target` is the index of the line to jump to.

    kinds: run, foreign; jump; unless (jump when the bool at `cond` is false); set (the i64 at `cond` becomes 0),
    count (it grows by 1), less (go on while the i64 at `cond` is below that at `limit`, else jump); demand.
    """

    kind: str
    step: Step | None = None
    foreign: Foreign | None = None
    demand: Demand | None = None
    cond: Operand | None = None
    limit: Operand | None = None
    target: int = -1
    serial: bool = False
    beside: bool = False


@dataclass(frozen=True, slots=True)
class Schedule:
    """The lines, and for each arena storage its first and last moment."""

    lines: tuple[Line, ...]
    lifetimes: dict[Storage, tuple[int, int]]


def guess(d: Dim) -> int:
    """A size as a number, symbols taken as `GUESS`."""
    if isinstance(d, Expr):
        d = substitute(d, {s.name: GUESS for s in symbols(d)})
    return d if isinstance(d, int) else 0


def schedule(plan: Plan) -> Schedule:
    """Put a plan's instructions in line."""
    lines: list[Line] = []
    loops: list[tuple[int, int, Loop]] = []
    _append(lines, plan.body, loops)
    return Schedule(tuple(lines), _lifetimes(lines, loops))


def _append(lines: list[Line], body: Sequence[Instruction], loops: list[tuple[int, int, Loop]]) -> None:
    """`loops` takes the first and last line of each loop, inner loops first."""
    reads: set[Storage] = set()
    writes: set[Storage] = set()
    for item in body:
        match item:
            case Step():
                serial = estimate_ns(guess(item.flops), guess(item.bytes)) < SERIAL_NS
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
            case Demand():
                lines.append(Line("demand", demand=item))
            case Branch():
                reads, writes = set(), set()
                at = len(lines)
                lines.append(Line("unless", cond=item.cond))
                _append(lines, item.then, loops)
                jump = len(lines)
                lines.append(Line("jump"))
                lines[at] = Line("unless", cond=item.cond, target=len(lines))
                _append(lines, item.otherwise, loops)
                lines[jump] = Line("jump", target=len(lines))
            case Loop():
                reads, writes = set(), set()
                counter = Operand(item.counter)
                start = len(lines)
                lines.append(Line("set", cond=counter))
                top = len(lines)
                lines.append(Line("less", cond=counter, limit=item.limit))
                if item.go is not None:
                    lines.append(Line("unless", cond=Operand(item.go)))
                _append(lines, item.body, loops)
                lines += [Line("count", cond=counter), Line("jump", target=top)]
                for i in range(top, top + 1 + (item.go is not None)):
                    lines[i] = replace(lines[i], target=len(lines))
                loops.append((start, len(lines) - 1, item))


def _lifetimes(lines: Sequence[Line], loops: Sequence[tuple[int, int, Loop]]) -> dict[Storage, tuple[int, int]]:
    found: dict[Storage, tuple[int, int]] = {}
    moments: list[int] = []
    for line in lines:
        moments.append((moments[-1] if moments else 0) + (not line.beside))
        for s in _touched(line):
            first, _ = found.get(s, (moments[-1], 0))
            found[s] = (first, moments[-1])
    for start, end, loop in loops:
        begin, last = moments[start], moments[end]
        for s in {s for line in lines[start : end + 1] for s in _touched(line)}:
            if found[s][0] < begin or s in loop.carried:
                found[s] = (min(found[s][0], begin), max(found[s][1], last))
    return found


def _touched(line: Line) -> list[Storage]:
    """The arena storages that a line reads or writes."""
    touched: list[Storage | None] = [o.storage for o in (line.cond, line.limit) if o is not None]
    if line.step is not None:
        touched += [o.storage for o in line.step.operands]
    if line.foreign is not None:
        touched += [v.storage for v in (*line.foreign.inputs, *line.foreign.outputs) if v is not None]
    return [s for s in touched if s is not None and s.kind == "arena"]
