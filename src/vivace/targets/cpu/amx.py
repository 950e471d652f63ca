"""Permission to use AMX, and with it the instruction set that code is made for here.

Linux saves tile registers only for processes that have asked for it.
Source: Documentation/arch/x86/xstate.rst of the Linux kernel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection
from functools import cache

from vivace.base.machine import AMX_FLAGS, Isa, best_isa, host, with_extras

_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


@cache
def is_permitted() -> bool:
    """Whether this process may use tile registers; asks for it the first time. All its threads may then."""
    if "amx_tile" not in host().flags:
        return False
    try:
        syscall = ctypes.CDLL(None).syscall
    except (OSError, AttributeError):
        return False
    return int(syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)) == 0


def host_isa() -> Isa:
    """The widest instruction set whose code runs in this process: with tiles, where the CPU has them and Linux lets
    this process use them.

    Raises: UnsupportedError where none does.
    """
    widest = best_isa(host())
    flags = host().flags & AMX_FLAGS.keys()
    if widest.level != "avx512" or "amx_tile" not in flags or not is_permitted():
        return widest
    return with_extras(widest, flags)


def missing_here(flags: Collection[str]) -> tuple[str, ...]:
    """What code that uses these CPU flags lacks in this process; empty where it can run."""
    lacking = set(flags) - host().flags
    if not lacking and AMX_FLAGS.keys() & set(flags) and not is_permitted():
        lacking = AMX_FLAGS.keys() & set(flags)
    return tuple(sorted(lacking))
