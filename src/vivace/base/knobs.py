"""The few switches that the environment can set: the only place that reads `os.environ`.

A knob is for the person at the machine (where does the cache lie, dump every stage); what belongs to one model is an
argument of `vivace.compile`. A value comes from the innermost `knobs.scope(...)`, else from the environment, else from
the knob's default.

Rules that the code cites:
    KNOWN   a variable that starts with VIVACE_ and is no knob is an error, and so is a value that does not parse.
    DOZEN   there are at most twelve knobs.
    THREAD  a scope holds for the code inside its `with` block, and not for other threads: read knobs where work is
            ordered, and hand their values to the threads that do it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast, overload

from vivace.base.errors import InputError
from vivace.base.machine import ISAS, isa

T = TypeVar("T")
PREFIX = "VIVACE_"

_scoped: ContextVar[dict[str, Any]] = ContextVar("vivace_knobs")


@dataclass(frozen=True, slots=True)
class Knob(Generic[T]):
    """One switch: how its text is read, and what it means.

    `form` says in words what `parse` accepts; `parse` raises ValueError for anything else.
    """

    name: str
    form: str
    parse: Callable[[str], T]
    default: Callable[[], T]
    default_text: str
    doc: str

    @property
    def variable(self) -> str:
        """The name in the environment."""
        return PREFIX + self.name.upper()

    @overload
    def __get__(self, owner: None, kind: type) -> Knob[T]: ...
    @overload
    def __get__(self, owner: Knobs, kind: type) -> T: ...
    def __get__(self, owner: Knobs | None, kind: type) -> Knob[T] | T:
        return self if owner is None else self.value()

    def value(self) -> T:
        """The value in force here and now.

        Raises: InputError where the environment holds an unknown knob or a value that does not parse (KNOWN).
        """
        _check_names()
        scoped = _scoped.get({})
        if self.name in scoped:
            return cast(T, scoped[self.name])
        text = os.environ.get(self.variable)
        return self.default() if text is None or text == "" else self.read(text)

    def read(self, text: str) -> T:
        """Parses a text as the environment would give it."""
        try:
            return self.parse(text.strip())
        except ValueError:
            raise InputError(f"cannot read {text!r}", where=self.variable, expected=self.form) from None


def _read_flag(text: str) -> bool:
    return {"0": False, "1": True}[text] if text in ("0", "1") else _refuse(text)


def _refuse(text: str) -> Any:
    raise ValueError(text)


def _read_bytes(text: str) -> int:
    """`4GiB`, `512 MiB`, `1000`: a size in bytes."""
    for suffix, factor in (("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40), ("", 1)):
        digits = text.removesuffix(suffix).strip()
        if text.endswith(suffix) and digits.isdecimal():
            return int(digits) * factor
    raise ValueError(text)


def _read_count(text: str) -> int:
    return int(text) if text.isdecimal() and int(text) > 0 else _refuse(text)


def _read_isa(text: str) -> str:
    try:
        return isa(text).name
    except InputError:
        return str(_refuse(text))


def _read_names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _read_path(text: str) -> Path:
    return Path(text).expanduser()


def _default_cache_dir() -> Path:
    # Source: the XDG Base Directory Specification; a relative XDG_CACHE_HOME is to be ignored.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "vivace"
    except RuntimeError:  # a container's user without a home: not a folder that others may fill with code
        return Path("/.cache/vivace")


class Knobs:
    """Every knob; read one as an attribute: `knobs.threads`."""

    cache_dir = Knob(
        "cache_dir", "a folder", _read_path, _default_cache_dir, "`$XDG_CACHE_HOME/vivace` or `~/.cache/vivace`",
        "Where compiled kernels, tuning results and measured peaks are kept between processes.",
    )  # fmt: skip
    cache_bytes = Knob(
        "cache_bytes", "a size such as 4GiB, 512MiB or 1000000", _read_bytes, lambda: 2 << 30, "`2GiB`",
        "The size that the cache is kept under, by dropping what was not used for longest; 0 turns it off.",
    )  # fmt: skip
    dump: Knob[Path | None] = Knob(
        "dump", "a folder", _read_path, lambda: None, "nothing is dumped",
        "Writes every stage of a compile into the folder as text (`03-fold_constants.txt`).",
    )  # fmt: skip
    explain: Knob[tuple[str, ...]] = Knob(
        "explain", "names of rules with commas between", _read_names, lambda: (), "no rule",
        "Prints where these rules nearly fired, and the reason why they did not.",
    )  # fmt: skip
    check = Knob(
        "check", "0 or 1", _read_flag, lambda: False, "`0`",
        "Shadows every kernel with the reference interpreter and names the first one that differs. Slow.",
    )  # fmt: skip
    traceback = Knob(
        "traceback", "0 or 1", _read_flag, lambda: False, "`0`",
        "Shows where in the code an error came from, before the command line's one paragraph.",
    )  # fmt: skip
    threads: Knob[int | None] = Knob(
        "threads", "a whole number above 0", _read_count, lambda: None, "one per usable physical core",
        "How many threads an engine uses where its `compile` or `load` was not told.",
    )  # fmt: skip
    isa: Knob[str | None] = Knob(
        "isa", f"{', '.join(ISAS)}, or one with extras, as in avx512+avx512_vnni", _read_isa, lambda: None,
        "the widest that the CPU has", "The instruction set that code is generated for.",
    )  # fmt: skip

    emulate = Knob(
        "emulate", "0 or 1", _read_flag, lambda: False, "`0`",
        "Computes in the precision asked for where the CPU has no instructions for it: slow, for tests.",
    )  # fmt: skip
    shuffle = Knob(
        "shuffle", "0 or 1", _read_flag, lambda: False, "`0`",
        "Runs the pieces of each step in a changing order and delays threads, so that steps which race differ. Slow.",
    )  # fmt: skip

    @staticmethod
    def all() -> tuple[Knob[Any], ...]:
        """The knobs in the order of this file."""
        return tuple(knob for knob in vars(Knobs).values() if isinstance(knob, Knob))

    @staticmethod
    @contextmanager
    def scope(**values: Any) -> Iterator[None]:
        """Gives knobs other values inside a `with` block; a text is read as the environment's would be (THREAD).

        Raises: InputError for an unknown knob or a text that does not parse.
        """
        known = {knob.name: knob for knob in Knobs.all()}
        unknown = sorted(values.keys() - known.keys())
        if unknown:
            raise InputError(f"unknown knob {unknown[0]!r}", expected=f"one of {', '.join(known)}")
        read = {name: known[name].read(v) if isinstance(v, str) else v for name, v in values.items()}
        token = _scoped.set({**_scoped.get({}), **read})
        try:
            yield
        finally:
            _scoped.reset(token)


knobs = Knobs()


def _check_names() -> None:
    known = {knob.variable for knob in Knobs.all()}
    unknown = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)
    if unknown:
        raise InputError(
            "unknown environment variable",
            where=unknown[0],
            expected=f"one of {', '.join(sorted(known))}",
            hint=f"unset {unknown[0]}",
        )


def render_knobs() -> str:
    """The page `docs/knobs.md`."""
    rows = [f"| `{k.variable}` | {k.form} | {k.default_text} | {k.doc} |" for k in Knobs.all()]
    head = [
        "# Knobs",
        "",
        "<!-- Generated by `make docs` from src/vivace/base/knobs.py: change it there. -->",
        "",
        "Environment variables for the person at the machine. An unknown `VIVACE_` variable, or a value that cannot be",
        "read, is an error. In Python, `with vivace.base.knobs.knobs.scope(threads=1): ...` does the same for a block.",
        "",
        "| variable | value | default | what it does |",
        "|---|---|---|---|",
    ]
    return "\n".join([*head, *rows, ""])
