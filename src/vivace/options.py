"""How a graph becomes an engine: what `compile` was asked for, with all defaults filled in."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vivace.base.errors import InputError
from vivace.base.knobs import knobs
from vivace.base.machine import ISAS, Isa, host, isa

if TYPE_CHECKING:
    from vivace.tuning import Tune

Progress = Callable[[str, int, int], None]

PROVIDERS = ("native", "onnxruntime", "openvino")


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


def disabled_names(disable: Sequence[str] | str) -> tuple[str, ...]:
    """What is left out. Raises: InputError for a name that is no pass, no rule and no choice of the lowering."""
    from vivace.lower.lowering import OPTIONS
    from vivace.optimize.pipeline import rule_names

    names = (disable,) if isinstance(disable, str) else tuple(disable)
    known = (*OPTIONS, *rule_names())
    for name in names:
        if name not in known:
            raise InputError(
                f"nothing is called {name!r}", where="disable",
                expected=f"{', '.join(OPTIONS)}, or a pass or rule of docs/rules.md",
                hint=" or ".join(difflib.get_close_matches(name, known, cutoff=0.6)),
            )  # fmt: skip
    return names


def choose_isa(target: str) -> Isa:
    """The instruction set to generate for. Raises: InputError when this CPU lacks it or the name is unknown."""
    from vivace.targets.cpu.amx import host_isa, missing_here

    name = knobs.isa or ("" if target == "host" else target)
    if not name:
        return host_isa()
    if name.partition("+")[0] not in ISAS:
        raise InputError(f"unknown target {name!r}", expected=f"host, {', '.join(ISAS)}, or one with extras")
    wanted = isa(name)
    missing = missing_here(wanted.flags)
    if missing:
        raise InputError(f"this CPU cannot run {name}", where="target", expected=f"a CPU with {', '.join(missing)}")
    return wanted


def threads_for(threads: Any) -> int:
    """As many threads as the affinity mask and the container's quota allow, unless told. Raises: InputError for what is
    no number of threads that a team takes."""
    from vivace.targets.cpu.team import MAX_THREADS

    if threads is None:
        return knobs.threads or host().n_compute_threads
    is_count = isinstance(threads, (int, np.integer)) and not isinstance(threads, bool)
    if not is_count or not 1 <= threads <= MAX_THREADS:
        raise InputError(f"threads is {threads!r}", expected=f"1 to {MAX_THREADS}")
    return int(threads)


def checked_shapes(shapes: Mapping[str, Any] | None) -> dict[str, tuple[int, ...]] | None:
    """Raises: InputError for what is no shape."""
    if not isinstance(shapes, Mapping | None):
        raise InputError(
            f"they are of type {type(shapes).__name__}", where="shapes",
            expected="shapes by input name, as in {'x': (1, 3, 224, 224)}",
        )  # fmt: skip
    for name, shape in (shapes or {}).items():
        sizes = tuple(shape) if isinstance(shape, Iterable) else (shape, None)
        if any(not isinstance(d, (int, np.integer)) or d < 0 for d in sizes):
            raise InputError(
                f"the shape {shape!r}", where=f"shapes[{name!r}]", expected="sizes, as in (1, 3, 224, 224)"
            )
    return None if shapes is None else {name: tuple(map(int, shape)) for name, shape in shapes.items()}


def provider_names(providers: object) -> tuple[str, ...]:
    """Those who may compute. Raises: InputError for a name that is nobody's."""
    found = providers.split(",") if isinstance(providers, str) else providers
    names = tuple(found) if isinstance(found, Iterable) else (found,)
    names = tuple(name.strip() if isinstance(name, str) else name for name in names)
    for name in names or ("",):
        if name not in (*PROVIDERS, "auto"):
            raise InputError(f"unknown provider {name!r}", where="providers", expected=", ".join((*PROVIDERS, "auto")))
    return names
