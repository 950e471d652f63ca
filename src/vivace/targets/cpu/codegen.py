"""From specs of the plan to machine code: one kernel per distinct spec, compiled once per machine and kept in the
disk cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from vivace.base.cache import Cache
from vivace.base.machine import Isa, host
from vivace.loops.blocked import Blocked
from vivace.loops.blockwise import BlockwiseProduct
from vivace.loops.contraction import Contraction, Depthwise
from vivace.loops.digits import Digits
from vivace.loops.kernel import Kernel
from vivace.loops.pack import Pack
from vivace.loops.split import Split
from vivace.lower.choices import DEFAULT, NO_CHOICES, Choice, Choices
from vivace.lower.tile import choose_tile
from vivace.targets.cpu import jit
from vivace.targets.cpu.code import KernelCode
from vivace.targets.cpu.contraction import emit_contraction
from vivace.targets.cpu.llvm import emit_kernel

_MOST_THREADS = 8  # writing the text takes a fifth of the time of compiling it, and is done by one thread
Spec = Kernel | Contraction | Depthwise | BlockwiseProduct | Blocked | Pack | Split | Digits
Known = dict[tuple[str, Choice], tuple[KernelCode, bytes]]  # kernels by spec and choice


def emit(spec: Spec, isa: Isa, choices: Choices = NO_CHOICES) -> KernelCode:
    """The LLVM text of a spec."""
    match spec:
        case Kernel():
            return emit_kernel(spec, isa)
        case Contraction():
            return emit_contraction(spec, isa, choose_tile(spec, isa, choice=choices.of(spec)))
        case Depthwise():
            from vivace.targets.cpu.depthwise import emit_depthwise

            return emit_depthwise(spec, isa, choices.of(spec))
        case Pack():
            from vivace.targets.cpu.pack import emit_pack

            return emit_pack(spec, isa)
        case Split():
            from vivace.targets.cpu.split import emit_split

            return emit_split(spec, isa)
        case Digits():
            from vivace.targets.cpu.digits import emit_digits

            return emit_digits(spec, isa)
        case BlockwiseProduct():
            from vivace.targets.cpu.blockwise import emit_blockwise

            return emit_blockwise(spec, isa)
        case Blocked():
            from vivace.targets.cpu.blocked import emit_blocked

            return emit_blocked(spec, isa)


def generate(
    specs: Sequence[Spec],
    isa: Isa,
    cache: Cache | None,
    progress: Callable[[int, int], None] | None = None,
    choices: Choices | None = None,
    known: Known | None = None,
) -> tuple[list[KernelCode], list[int], list[bytes], int]:
    """Compile the distinct specs, several at once: while LLVM works on one, the text of the next is written.

    `known` keeps kernels in memory, for whoever generates versions of one model. `progress` is told how many kernels
    are done, of how many. Returns the kernels, for each spec the number of its kernel, the object of each kernel, and
    how many were compiled anew.
    """
    choices, known = choices or NO_CHOICES, {} if known is None else known
    keys = [hashlib.sha256(repr(spec).encode()).hexdigest()[:24] for spec in specs]
    distinct = dict(zip(keys, specs, strict=True))
    number = {key: i for i, key in enumerate(distinct)}
    codes: list[KernelCode] = []
    names: list[tuple[str, Choice]] = []
    objects: list[bytes | Future[bytes]] = []
    done: list[bytes] = []
    found: bytes | None

    def tell() -> None:
        if progress:
            progress(sum(not isinstance(o, Future) or o.done() for o in objects), len(distinct))

    threads = ThreadPoolExecutor(max(1, min(host().n_compute_threads, _MOST_THREADS)), "vivace-compile")
    try:
        for key, spec in distinct.items():
            made = (key, choices.of(spec) if isinstance(spec, (Contraction, Depthwise)) else DEFAULT)
            names.append(made)
            if made in known:
                code, found = known[made]
            else:
                code = emit(replace(spec, name=f"k_{key}"), isa, choices)
                found = cache.get("object", jit.object_key(code, isa)) if cache else None
            objects.append(threads.submit(jit.compile_kernel, code, isa) if found is None else found)
            codes.append(code)
            tell()
        for made, code, o in zip(names, codes, objects, strict=True):
            done.append(o.result() if isinstance(o, Future) else o)
            known[made] = (code, done[-1])
            if cache and isinstance(o, Future):
                cache.put("object", jit.object_key(code, isa), done[-1])
            tell()
    finally:
        threads.shutdown(cancel_futures=True)  # an interrupt waits for the kernels at work, not for all
    return codes, [number[key] for key in keys], done, sum(isinstance(o, Future) for o in objects)
