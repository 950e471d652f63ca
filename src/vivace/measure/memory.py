"""Peak memory and cold start of an engine, each in a fresh process of its own.

Rules:
* FRESH: in one process with several engines nobody can say whose memory it is, and what one has imported the next
  does not load; so each engine gets a child that loads the model, runs it a few times, and reports what it took.
* OWN: the peak is the child's own `VmHWM`, which starts anew with its program; `ru_maxrss` begins at the parent's.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vivace.base.errors import ProviderError


@dataclass(frozen=True, slots=True)
class ColdStart:
    """What a fresh process took: from the start of Python to the first answer, and its memory at most."""

    import_seconds: float
    load_seconds: float
    first_run_seconds: float
    peak_bytes: int
    base_bytes: int  # before the engine was imported


def peak_bytes() -> int:
    """The most memory that this process held resident; 0 where the system does not tell."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError):
        pass
    return 0


def cold_start(command: Sequence[str], timeout_seconds: float = 600.0) -> ColdStart:
    """Runs a child that prints a ColdStart as JSON on its last line (FRESH).

    Raises: ProviderError with the child's complaint when it fails.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_seconds, check=False)
    except subprocess.TimeoutExpired as late:
        raise ProviderError(f"a fresh process took more than {timeout_seconds:g} s", where=command[0]) from late
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        complaint = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ProviderError(f"a fresh process failed: {complaint[-1]}", where="memory")
    return ColdStart(**json.loads(lines[-1]))
