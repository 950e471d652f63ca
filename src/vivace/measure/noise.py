"""Whether the machine was quiet while something was measured: load, stolen time, involuntary context switches.

Not handled: temperature and clock changes, which virtual machines do not show.
"""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Counters of the process and the machine at one moment."""

    at_seconds: float
    cpu_seconds: float  # of this process, all threads
    n_switches: int  # involuntary
    steal_seconds: float
    busy_seconds: float  # of the whole machine


@dataclass(frozen=True, slots=True)
class Noise:
    """What happened between two moments.

    `foreign_cores` is how many cores other processes kept busy on average; `steal` the share of the machine's time that
    its host gave to others; `switches_per_second` how often a thread of ours lost its core.
    """

    load_average: float
    foreign_cores: float
    steal: float
    switches_per_second: float

    @property
    def is_quiet(self) -> bool:
        """Whether neighbours took less than a tenth of a core."""
        return self.foreign_cores < 0.1 and self.steal < 0.02


def snapshot(root: Path = Path("/")) -> Snapshot:
    """The counters now."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    busy, steal = _machine_seconds(root)
    return Snapshot(time.monotonic(), usage.ru_utime + usage.ru_stime, usage.ru_nivcsw, steal, busy)


def noise_since(start: Snapshot, root: Path = Path("/")) -> Noise:
    """What happened since a snapshot."""
    now = snapshot(root)
    elapsed = max(1e-6, now.at_seconds - start.at_seconds)
    ours = now.cpu_seconds - start.cpu_seconds
    n_cores = os.cpu_count() or 1
    return Noise(
        load_average=os.getloadavg()[0],
        foreign_cores=max(0.0, (now.busy_seconds - start.busy_seconds - ours) / elapsed),
        steal=(now.steal_seconds - start.steal_seconds) / elapsed / n_cores,
        switches_per_second=(now.n_switches - start.n_switches) / elapsed,
    )


def _machine_seconds(root: Path) -> tuple[float, float]:
    """Busy and stolen seconds of all cores since boot; zeros where the system does not tell."""
    try:
        first = (root / "proc/stat").read_text().splitlines()[0].split()
        ticks = [int(t) for t in first[1:9]]
    except (OSError, ValueError, IndexError):
        return 0.0, 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = ticks
    per_second = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / per_second, steal / per_second
