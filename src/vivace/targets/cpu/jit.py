"""From LLVM text to machine code: relocatable ELF objects, which `elf.load` puts into memory.

Objects are plain bytes: they can be kept on disk and loaded by another process, which then compiles nothing.

Rules:
* PLAIN: the CPU is described by the features of an `Isa` alone, so that an object depends on nothing but its text, the
  `Isa` and `CODE_VERSION`.
* CLOSED: code calls nothing outside its object. Kernels forbid LLVM to invent calls of the C library.
* PARALLEL: several threads may compile at once. Each module has a context of its own and each thread a description of
  the target of its own, which is what LLVM asks for; so the long calls go around llvmlite's one lock.
* LATE: LLVM is loaded when something is compiled, not before: it takes 45 MiB of memory and a tenth of a second.

Not handled: a `fork` while another thread compiles. The child may load and run engines, but where it compiles it may
wait for a lock that nobody holds any more.
"""

from __future__ import annotations

import ctypes
import hashlib
import threading
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import llvmlite

from vivace.base.errors import InternalError
from vivace.base.machine import Isa
from vivace.targets.cpu.code import KernelCode, Optimize
from vivace.targets.cpu.elf import Library, load
from vivace.targets.cpu.isa import TRIPLE, cpu_name

if TYPE_CHECKING:
    import llvmlite.binding as llvm

__all__ = [
    "CODE_VERSION", "Library", "assembly", "compile_kernel", "compile_objects", "compile_text", "load", "object_key",
    "optimized_text", "target_machine",
]  # fmt: skip

CODE_VERSION = f"llvmlite-{llvmlite.__version__}-1"

_lock = threading.RLock()
_of_thread = threading.local()


def _llvm() -> ModuleType:
    """LLVM itself; a process that finds all of its code in the cache never loads it (rule LATE)."""
    import llvmlite.binding

    return llvmlite.binding


@cache
def _target() -> llvm.Target:
    binding = _llvm()
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    return binding.Target.from_triple(TRIPLE)


def target_machine(isa: Isa) -> llvm.TargetMachine:
    """LLVM's description of the instruction set (rule PLAIN), one per thread (rule PARALLEL)."""
    machines: dict[Isa, llvm.TargetMachine] = _of_thread.__dict__.setdefault("machines", {})
    if isa not in machines:
        with _lock:
            machines[isa] = _target().create_target_machine(
                cpu=cpu_name(isa), features=isa.feature_text, opt=2, reloc="pic", codemodel="small"
            )
    return machines[isa]


def _unlocked(name: str) -> Callable[..., Any]:
    """A function of LLVM without llvmlite's lock (rule PARALLEL); with it in a llvmlite that keeps it elsewhere."""
    from llvmlite.binding import ffi

    function = getattr(ffi.lib, name)
    return getattr(function, "_cfn", function)


def _object_of(module: llvm.ModuleRef, machine: llvm.TargetMachine) -> bytes:
    from llvmlite.binding import ffi

    with ffi.OutputString() as error:
        buffer = _unlocked("LLVMPY_TargetMachineEmitToMemory")(machine, module, 1, error)
        if not buffer:
            raise InternalError(f"LLVM cannot emit code: {error}", expected="an object")
    try:
        return ctypes.string_at(ffi.lib.LLVMPY_GetBufferStart(buffer), ffi.lib.LLVMPY_GetBufferSize(buffer))
    finally:
        ffi.lib.LLVMPY_DisposeMemoryBuffer(buffer)


def _optimize(module: llvm.ModuleRef, machine: llvm.TargetMachine, level: Optimize) -> None:
    if level == "none":
        return
    binding = _llvm()
    tuning = binding.PipelineTuningOptions(speed_level=2)
    tuning.loop_vectorization = tuning.slp_vectorization = tuning.loop_unrolling = tuning.loop_interleaving = False
    builder = binding.create_pass_builder(machine, tuning)
    if level == "full":
        passes = builder.getModulePassManager()
        _unlocked("LLVMPY_RunNewModulePassManager")(passes, module, builder)
        return
    light = binding.create_new_function_pass_manager()
    light.add_instruction_combine_pass()
    light.add_simplify_cfg_pass()
    for function in module.functions:
        if not function.is_declaration:
            _unlocked("LLVMPY_RunNewFunctionPassManager")(light, function, builder)


def _module(text: str, isa: Isa, optimize: Optimize, name: str) -> tuple[llvm.ModuleRef, llvm.TargetMachine]:
    machine = target_machine(isa)
    binding = _llvm()
    try:
        # A context of its own, so that the memory of types and constants goes when the module does.
        module = binding.parse_assembly(text, context=binding.create_context())
        module.triple = TRIPLE
        module.data_layout = str(machine.target_data)
        try:
            module.verify()
        except RuntimeError:
            module.close()  # collected later with the traceback, its context might go first
            raise
    except RuntimeError as e:
        raise InternalError(f"LLVM refuses the generated text: {e}", where=name, expected="valid LLVM IR") from e
    _optimize(module, machine, optimize)
    return module, machine


def compile_text(text: str, isa: Isa, optimize: Optimize = "full", name: str = "module") -> bytes:
    """One ELF object from the LLVM text of a module."""
    module, machine = _module(text, isa, optimize, name)
    return _object_of(module, machine)


def compile_kernel(code: KernelCode, isa: Isa) -> bytes:
    """The ELF object of a kernel."""
    return compile_text(code.llvm_text, isa, code.optimize, code.name)


def compile_objects(codes: Sequence[KernelCode], isa: Isa, optimize: Optimize | None = None) -> list[bytes]:
    """One ELF object per kernel, in order; `optimize` overrides what the kernels ask for."""
    return [compile_text(code.llvm_text, isa, optimize or code.optimize, code.name) for code in codes]


def assembly(text: str, isa: Isa, optimize: Optimize = "full") -> str:
    """The assembly of a module, for people and for tests that look at instructions."""
    with _lock:
        module, machine = _module(text, isa, optimize, "module")
        return str(machine.emit_assembly(module))


def optimized_text(text: str, isa: Isa, optimize: Optimize = "full") -> str:
    """The LLVM text after the passes, for people."""
    with _lock:
        return str(_module(text, isa, optimize, "module")[0])


def object_key(code: KernelCode, isa: Isa) -> str:
    """A name under which the compiled object can be cached (rule PLAIN)."""
    facts = repr((CODE_VERSION, TRIPLE, cpu_name(isa), isa.feature_text, code.optimize))
    return hashlib.sha256(facts.encode() + b"\0" + code.llvm_text.encode()).hexdigest()
