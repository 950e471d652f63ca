"""From specs of the plan to machine code: one kernel per distinct spec, compiled once per machine and kept in the
disk cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from vivace.base.cache import Cache
from vivace.base.machine import Isa
from vivace.loops.blocked import Blocked
from vivace.loops.contraction import Contraction, Depthwise
from vivace.loops.kernel import Kernel
from vivace.targets.cpu import jit
from vivace.targets.cpu.code import KernelCode
from vivace.targets.cpu.contraction import emit_contraction
from vivace.targets.cpu.llvm import emit_kernel

Spec = Kernel | Contraction | Depthwise | Blocked


def emit(spec: Spec, isa: Isa) -> KernelCode:
    """The LLVM text of a spec."""
    match spec:
        case Kernel():
            return emit_kernel(spec, isa)
        case Contraction():
            return emit_contraction(spec, isa)
        case Depthwise():
            from vivace.targets.cpu.depthwise import emit_depthwise

            return emit_depthwise(spec, isa)
        case Blocked():
            from vivace.targets.cpu.blocked import emit_blocked

            return emit_blocked(spec, isa)


def generate(
    specs: Sequence[Spec], isa: Isa, cache: Cache | None, progress: Callable[[int, int], None] | None = None
) -> tuple[list[KernelCode], list[int], list[bytes], int]:
    """Compile the distinct specs.

    Returns the kernels, for each spec the number of its kernel, the object of each kernel, and how many were compiled
    anew.
    """
    numbers: list[int] = []
    seen: dict[str, int] = {}
    codes: list[KernelCode] = []
    objects: list[bytes] = []
    n_new = 0
    for i, spec in enumerate(specs):
        key = hashlib.sha256(repr(spec).encode()).hexdigest()[:24]
        if key not in seen:
            seen[key] = len(codes)
            code = emit(replace(spec, name=f"k_{key}"), isa)
            object_key = jit.object_key(code, isa)
            found = cache.get("object", object_key) if cache else None
            if found is None:
                found = jit.compile_kernel(code, isa)
                n_new += 1
                if cache:
                    cache.put("object", object_key, found)
            codes.append(code)
            objects.append(found)
        numbers.append(seen[key])
        if progress:
            progress(i + 1, len(specs))
    return codes, numbers, objects, n_new
