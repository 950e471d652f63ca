"""What LLVM is told about an instruction set: CPU name, features, function attributes.

The CPU name is always a generic level of the x86-64 psABI: it only chooses LLVM's scheduling model and default tuning.
What may be used comes from the features of the `Isa`, never from the name that the machine reports for itself.
"""

from __future__ import annotations

from vivace.base.errors import UnsupportedError
from vivace.base.machine import Isa

TRIPLE = "x86_64-unknown-linux-gnu"

_CPU_NAMES = {"sse": "x86-64-v2", "avx2": "x86-64-v3", "avx512": "x86-64-v4"}


def cpu_name(isa: Isa) -> str:
    """LLVM's name of the generic CPU that has the instruction set.

    Raises: UnsupportedError for an instruction set that has no code generator.
    """
    try:
        return _CPU_NAMES[isa.level]
    except KeyError:
        raise UnsupportedError(
            f"no code generator for instruction set {isa.name}", expected="sse, avx2 or avx512"
        ) from None


def has_masks(isa: Isa) -> bool:
    """Whether any load and store can be masked per lane at no cost (AVX-512)."""
    return isa.vector_bits >= 512


def kernel_attributes(isa: Isa) -> str:
    """Attributes of a generated function: no exceptions, no calls invented by LLVM, full-width vectors."""
    return (
        f'nounwind "no-builtins" "prefer-vector-width"="{isa.vector_bits}" "min-legal-vector-width"="{isa.vector_bits}"'
    )
