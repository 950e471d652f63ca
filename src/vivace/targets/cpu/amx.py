"""Permission to use AMX: Linux saves tile registers only for processes that have asked for it.

Source: Documentation/arch/x86/xstate.rst of the Linux kernel.
"""

from __future__ import annotations

import ctypes
from functools import cache

from vivace.base.machine import AMX_FLAGS, Isa, Machine, host, with_extras

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


def with_amx(isa: Isa, machine: Machine | None = None) -> Isa:
    """The instruction set with tiles, where the CPU has them and Linux lets this process use them."""
    flags = (machine or host()).flags & AMX_FLAGS.keys()
    if isa.level != "avx512" or "amx_tile" not in flags or not is_permitted():
        return isa
    return with_extras(isa, flags)
