"""The timing cache: what was measured about sites, a JSON object a line, in files that can be shipped and merged.

    {"format": 1, "version": "0.1.0", "machine": "x86_64-..", "isa": "avx512", "threads": 2, "site": "..",
     "what": "matmul 128x768x768", "choice": {"rows": 9, "lanes": 48}, "ratio": 0.91, "ns": 41000, "decided": "fast"}

`ratio` is the time with the choice over the default's, measured in turn. A line with `decided` says that the choice is
to be used, and with what effort it was found; one without says what was tried, so that an interrupted search goes on.

Rules:
* OWN: only lines of this machine, instruction set, number of threads and version of vivace, whose kernels were timed,
  count; others are kept and left alone.
* LINES: a file only grows, by whole lines; a line that is torn, or that this version does not know, is passed over.
* LATER: of two lines about one choice the later counts, and of two decisions that with more effort, else the later.

Not handled: locking. Two processes that append at once may decide the same site twice.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vivace.base.cache import write_atomic
from vivace.base.errors import InputError
from vivace.base.events import warn
from vivace.base.knobs import knobs
from vivace.base.machine import host
from vivace.base.version import __version__
from vivace.lower.choices import Choice, Choices

FORMAT = 1  # of the lines, and of what the settings mean
EFFORTS = ("off", "fast", "full")
_MOST_BYTES = 16 << 20  # a file that is larger is rewritten without lines that no longer count


@dataclass(frozen=True, slots=True)
class Timing:
    """One line."""

    machine: str
    isa: str
    threads: int
    site: str
    what: str
    choice: Choice
    ratio: float
    ns: float
    decided: str = ""
    version: str = __version__

    @property
    def key(self) -> tuple[str, str, str, int, str, str, bool]:
        """What two lines about the same have in common: later ones replace earlier ones."""
        choice = "" if self.decided else str(self.choice)
        return (self.version, self.machine, self.isa, self.threads, self.site, choice, bool(self.decided))

    def line(self) -> str:
        """As it stands in a file."""
        data = {"format": FORMAT, "version": self.version, "machine": self.machine, "isa": self.isa,
                "threads": self.threads, "site": self.site, "what": self.what, "choice": self.choice.settings(),
                "ratio": round(self.ratio, 4), "ns": round(self.ns)}  # fmt: skip
        return json.dumps(data | ({"decided": self.decided} if self.decided else {})) + "\n"


def own_file() -> Path:
    """Where this machine keeps what it measured."""
    return knobs.cache_dir / "timing" / f"{host().fingerprint()}.jsonl"


def parse(line: str) -> Timing | None:
    """None for a line that is damaged or of another format."""
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, OverflowError):
        data = json.loads(line)
        choice, decided = Choice.of(data["choice"]), data.get("decided", "")
        known = data["format"] == FORMAT and choice is not None and decided in ("", *EFFORTS)
        ratio, ns = float(data["ratio"]), float(data["ns"])
        texts = [*(data[k] for k in ("machine", "isa", "site", "what")), data.get("version", "")]  # old lines have none
        if known and choice is not None and 0 < ratio < 1e6 and ns >= 0 and all(isinstance(t, str) for t in texts):
            machine, isa, site, what, version = texts
            return Timing(machine, isa, int(data["threads"]), site, what, choice, ratio, ns, decided, version)
    return None


def read(path: Path) -> list[Timing]:
    """The lines of a file; none where there is no file."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return []
    found = [parse(line) for line in text.splitlines() if line.strip()]
    kept = [t for t in found if t is not None]
    if len(kept) < len(found):
        warn("tuning", f"passed over {len(found) - len(kept)} of {len(found)} lines of {path}")
    return kept


def merge(timings: Iterable[Timing]) -> list[Timing]:
    """One line for each thing (LATER), in a stable order."""
    found: dict[object, Timing] = {}
    for t in timings:
        before = found.get(t.key)
        if before is None or EFFORTS.index(t.decided or "off") >= EFFORTS.index(before.decided or "off"):
            found[t.key] = t
    return sorted(found.values(), key=lambda t: tuple(map(str, t.key)))


def write(path: Path, timings: Iterable[Timing]) -> None:
    """Replaces a file."""
    write_atomic(path, [t.line().encode() for t in timings])


class TimingCache:
    """The lines that count here: of `paths`, by this version, for one machine, instruction set and number of threads.

    `file` was asked for by a user, `own` is the machine's: both are read, the file's lines count more, and what is
    added goes to both. Either may be missing.
    """

    def __init__(self, file: Path | None, own: Path | None, machine: str, isa: str, threads: int) -> None:
        self.file = file
        paths = [p for p in (file, own) if p is not None]
        self.paths, self.machine, self.isa, self.threads = tuple(paths), machine, isa, threads
        lines = merge(t for p in reversed(self.paths) for t in read(p))
        here = (__version__, machine, isa, threads)
        self.timings = {t.key: t for t in lines if (t.version, t.machine, t.isa, t.threads) == here}

    def decided(self, effort: str = "fast") -> dict[str, Choice]:
        """The choices found with this effort or more, by site."""
        least = EFFORTS.index(effort)
        return {t.site: t.choice for t in self.timings.values() if t.decided and EFFORTS.index(t.decided) >= least}

    def choices(self, at: str = "", effort: str = "fast") -> Choices:
        """The same for lowering; `at` says what symbolic sizes are."""
        return Choices({k: c for k, c in self.decided(effort).items() if c != Choice()}, at)

    def tried(self, site: str) -> dict[Choice, float]:
        """What was measured of a site, with its ratio to the default."""
        return {t.choice: t.ratio for t in self.timings.values() if t.site == site and not t.decided}

    def timing(self, site: str, what: str, choice: Choice, ratio: float, ns: float, decided: str = "") -> Timing:
        """A line about this machine."""
        return Timing(self.machine, self.isa, self.threads, site, what, choice, ratio, ns, decided)

    def add(self, timings: Sequence[Timing]) -> None:
        """Keeps lines, here and in the files.

        Raises: InputError where the file that was asked for cannot be written.
        """
        self.timings |= {t.key: t for t in timings}
        text = "".join(t.line() for t in timings)
        for path in self.paths:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.exists() and path.stat().st_size > _MOST_BYTES:
                    write(path, merge(read(path)))
                with path.open("a") as file:
                    file.write(text)
            except OSError as e:
                if path == self.file:
                    raise InputError(f"cannot write: {e.strerror or e}", where=str(path)) from e
                warn("tuning", f"cannot keep timings in {path}: {e.strerror or e}")


def summary(timings: Sequence[Timing]) -> dict[tuple[str, str, int], dict[str, int]]:
    """How many lines and decisions there are for each machine, instruction set and number of threads."""
    found: dict[tuple[str, str, int], dict[str, int]] = {}
    for t in timings:
        counts = found.setdefault((t.machine, t.isa, t.threads), {"measured": 0, "decided": 0, "changed": 0})
        counts["measured"] += not t.decided
        counts["decided"] += bool(t.decided)
        counts["changed"] += bool(t.decided) and t.choice != Choice()
    return found


def refuse_other_file(path: Path) -> None:
    """Raises: InputError for a file that holds something else than timings: lines would be added to it."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(1) not in (b"", b"{"):
                raise InputError("is no timing cache", where=str(path), expected="a file of JSON lines, or a free name")
