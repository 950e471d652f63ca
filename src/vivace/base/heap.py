"""The heap of the C library."""

from __future__ import annotations

import ctypes
import sys


def trim() -> None:
    """Give what is free in the heap back to the system (`malloc_trim` of glibc; elsewhere nothing happens).

    A compilation makes and drops many small objects, whose memory would stand beside that of the first run.
    """
    if sys.platform == "linux" and (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        malloc_trim(0)
