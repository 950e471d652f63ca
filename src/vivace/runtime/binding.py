"""From the arrays of a call to the values of the dims, and from those to memory.

Arena offsets are planned for dims rounded up (`ROUNDING`), so that a shape that grows by one each call (a decoder's
cache) is planned once in many calls; a plan serves every smaller shape of its class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vivace.base.dims import Expr, evaluate, linear, never_falls, symbols
from vivace.base.errors import ShapeError
from vivace.base.specs import TensorSpec
from vivace.lower.image import Image
from vivace.lower.memory import Lifetime, MemoryPlan, plan_memory
from vivace.runtime.evaluation import Evaluation
from vivace.targets.cpu.formulas import Words

ROUNDING = 64  # above this, a dim is planned as the next multiple of it
MAX_PLANS = 256  # classes of shapes whose plan is remembered


class ShapeSolver:
    """Values of the symbols in the input specs, from the shapes of a call."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self.specs = tuple(specs)
        self.is_static = all(isinstance(d, int) for s in specs for d in s.shape)
        distinct = {d: i for i, d in enumerate(dict.fromkeys(d for s in self.specs for d in s.shape))}
        self._numbers = [[distinct[d] for d in s.shape] for s in self.specs]

    def solve(self, shapes: Sequence[tuple[int, ...]]) -> dict[str, int]:
        """Raises: ShapeError that names the input and the axis that does not fit."""
        env: dict[str, int] = {}
        later: list[tuple[TensorSpec, int, Expr, int]] = []
        seen: set[tuple[int, int]] = set()  # a decoder's caches all say the same
        for spec, shape, numbers in zip(self.specs, shapes, self._numbers, strict=True):
            if len(shape) != len(spec.shape):
                raise ShapeError(
                    f"the array has rank {len(shape)}, shape {list(shape)}",
                    where=f"input {spec.name!r}",
                    expected=str(spec),
                )
            for axis, said in enumerate(zip(numbers, shape, strict=True)):
                if said in seen:
                    continue
                seen.add(said)
                want, have = spec.shape[axis], said[1]
                if isinstance(want, Expr):
                    later.append((spec, axis, want, have))
                elif want != have:
                    raise _mismatch(spec, axis, shape, str(want))
        for _ in range(len(later) + 1):
            waiting = []
            for spec, axis, want, have in later:
                unknown = sorted({s.name for s in symbols(want)} - env.keys())
                if not unknown:
                    if evaluate(want, env) != have:
                        raise ShapeError(
                            f"axis {axis} is {have}, but {want} is {evaluate(want, env)} by the other inputs",
                            where=f"input {spec.name!r}", expected=str(spec),
                        )  # fmt: skip
                elif len(unknown) == 1 and (form := linear(want, unknown[0])) is not None:
                    coefficient, rest = (evaluate(d, env) for d in form)
                    value, off = divmod(have - rest, coefficient)
                    low, high = next((x.lo, x.hi) for x in symbols(want) if x.name == unknown[0])
                    if off or value < (low or 0) or (high is not None and value > high):
                        least, most = low or 0, "" if high is None else f" to {high}"
                        raise ShapeError(
                            f"axis {axis} is {have}",
                            where=f"input {spec.name!r}",
                            expected=f"{want} with {unknown[0]} from {least}{most or ' up'}",
                        )
                    env[unknown[0]] = value
                else:
                    waiting.append((spec, axis, want, have))
            if len(waiting) == len(later):
                break
            later = waiting
        return env


def _mismatch(spec: TensorSpec, axis: int, shape: tuple[int, ...], want: str) -> ShapeError:
    return ShapeError(
        f"axis {axis} is {shape[axis]}, shape {list(shape)}",
        where=f"input {spec.name!r}",
        expected=f"{want}, as in {spec}",
    )


class MemoryPlanner:
    """Arena offsets of an image for given dims, and the size of the arena: the values of `names`."""

    def __init__(self, image: Image) -> None:
        self.arena = [s for s in image.storages if s.kind == "arena"]
        self.names = (*(f"@{k}" for k, s in enumerate(image.storages) if s.kind == "arena"), "@arena")
        self.sizes = Evaluation([s.n_bytes for s in self.arena])
        self._may_fall = not all(map(never_falls, {s.n_bytes for s in self.arena}))
        self.planned: dict[tuple[int, ...], tuple[Words, Words, MemoryPlan]] = {}

    def plan(self, dims: Mapping[str, int]) -> tuple[Words, MemoryPlan]:
        """Offsets for these dims; the plan is kept for the class of shapes."""
        key = tuple(_round_up(dims[n]) for n in self.sizes.names)
        found = self.planned.get(key)
        if found is None:
            if len(self.planned) >= MAX_PLANS:
                self.planned.clear()  # also while another thread is here, so `planned` is not asked again
            found = self.planned[key] = self._make(dict(zip(self.sizes.names, key, strict=True)))
        sizes, offsets, plan = found
        if self._may_fall and (self.sizes(dims) > sizes).any():  # a size that falls as a dim grows
            _, offsets, plan = self._make(dims)
        return offsets, plan

    def _make(self, dims: Mapping[str, int]) -> tuple[Words, Words, MemoryPlan]:
        sizes = self.sizes(dims)
        plan = plan_memory([Lifetime(n, s.first, s.last) for n, s in zip(sizes.tolist(), self.arena, strict=True)])
        return sizes, np.array([*plan.offsets, plan.arena_bytes], np.int64), plan


def _round_up(v: int) -> int:
    return v if v <= ROUNDING else -(-v // ROUNDING) * ROUNDING
