"""How a graph becomes an engine: what `compile` was asked for, with all defaults filled in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vivace.base.errors import InputError
from vivace.base.knobs import knobs
from vivace.base.machine import ISAS, Isa, host, isa, missing_flags

if TYPE_CHECKING:
    from vivace.tuning import Tune

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Options:
    """One set of them."""

    threads: int
    target: Isa
    providers: tuple[str, ...] = ("native", "onnxruntime")
    precision: str = "f32"
    level: int | str = 99
    disable: tuple[str, ...] = ()
    cache: bool = True
    progress: Progress | None = None
    tune: Tune | None = None

    @property
    def without(self) -> frozenset[str]:
        """Choices of the lowering that are switched off."""
        from vivace.lower.lowering import OPTIONS

        return frozenset(self.disable) & OPTIONS.keys()

    @property
    def kept(self) -> list[str]:
        """What else is disabled: passes and rules of the optimizer."""
        return [name for name in self.disable if name not in self.without]

    @property
    def facts(self) -> dict[str, object]:
        """What an engine keeps, so that it can be made again in the same way on another CPU."""
        return {"level": self.level, "disable": list(self.disable)}


def choose_isa(target: str) -> Isa:
    """The instruction set to generate for. Raises: InputError when this CPU lacks it or the name is unknown."""
    name = knobs.isa or ("" if target == "host" else target)
    if not name:
        from vivace.targets.cpu.amx import host_isa

        return host_isa()
    if name not in ISAS:
        raise InputError(f"unknown target {name!r}", expected="host, " + ", ".join(ISAS))
    missing = missing_flags(host(), isa(name))
    if missing:
        raise InputError(f"this CPU cannot run {name}", where="target", expected=f"a CPU with {', '.join(missing)}")
    return isa(name)


def threads_for(threads: int | None) -> int:
    """As many threads as the affinity mask and the container's quota allow, unless told. Raises: InputError below 1."""
    if threads is None:
        return knobs.threads or host().n_compute_threads
    if threads < 1:
        raise InputError(f"threads is {threads}", expected="at least 1")
    return threads
