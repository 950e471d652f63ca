"""Several steps of a plan become one, so that what they hand to each other need not be in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from vivace.lower.in_place import storages_of
from vivace.lower.plan import Instruction, Plan, Step
from vivace.lower.views import Storage


@dataclass(frozen=True, slots=True)
class Joined:
    """The step that stands for those at some positions, in order: it takes the place of the last one. `inner` are the
    storages that are gone with them.
    """

    step: Step
    steps: tuple[int, ...]
    inner: set[Storage]


Join = Callable[[Sequence[Instruction | None], Mapping[Storage, Sequence[int]], int], Joined | None]


def join_steps(plan: Plan, join: Join) -> Plan:
    """The plan with steps joined. `join(body, touched, at)` says what to do about the step at a position; in `body`,
    what was joined before is None, and `touched` are the positions of the steps that read or write a storage.
    """
    body: list[Instruction | None] = list(plan.body)
    touched: dict[Storage, list[int]] = {}
    for i, item in enumerate(plan.body):
        for s in storages_of(item):
            touched.setdefault(s, []).append(i)
    gone: set[Storage] = set()
    for i in range(len(body)):
        found = join(body, touched, i) if isinstance(body[i], Step) else None
        if found is None:
            continue
        for k in found.steps:
            body[k] = None
        body[found.steps[-1]] = found.step
        assert not found.inner & storages_of(found.step), "a joined step reads what is gone"
        gone |= found.inner
    if not gone:
        return plan
    return replace(
        plan,
        body=tuple(x for x in body if x is not None),
        storages=tuple(s for s in plan.storages if s not in gone),
        views={value: view for value, view in plan.views.items() if view.storage not in gone},
    )


def may_move(body: Sequence[Instruction | None], steps: Sequence[int]) -> bool:
    """Whether all may run where the last one stands (rule ALONE)."""
    inside = set(steps)
    read = {s for k in steps if isinstance(x := body[k], Step) for s in x.reads}
    for k in range(steps[0], steps[-1]):
        between = body[k]
        if k in inside or between is None:
            continue
        if not isinstance(between, Step) or read.intersection(between.writes):
            return False
    return True
