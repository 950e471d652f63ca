"""From LLVM text to machine code in memory: compile to relocatable ELF objects, load objects, find symbols.

Objects are plain bytes: they can be kept on disk and loaded by another process, which then compiles nothing.

Rules:
* PLAIN: the CPU is described by the features of an `Isa` alone, so that an object depends on nothing but its text, the
  `Isa` and `CODE_VERSION`.
* CLOSED: code calls nothing outside its object. Kernels forbid LLVM to invent calls of the C library.
* ALIVE: addresses of a `Library` are valid as long as the `Library` lives.
"""

from __future__ import annotations

import hashlib
import struct
import threading
from collections.abc import Sequence
from functools import cache

import llvmlite
import llvmlite.binding as llvm

from vivace.base.errors import InternalError
from vivace.base.machine import Isa
from vivace.targets.cpu.code import KernelCode, Optimize
from vivace.targets.cpu.isa import TRIPLE, cpu_name

CODE_VERSION = f"llvmlite-{llvmlite.__version__}-1"

_SYMBOL_TABLE, _SYMBOL_BYTES = 2, 24
_OBJECT_MAGIC = b"\x7fELF\x02\x01"
_lock = threading.RLock()


class Library:
    """Loaded machine code."""

    def __init__(self, engine: llvm.ExecutionEngine) -> None:
        self._engine = engine
        self._addresses: dict[str, int] = {}

    def address(self, symbol: str) -> int:
        """The address of a function or of global data.

        Raises: InternalError when no loaded object defines the symbol.
        """
        found = self._addresses.get(symbol)
        if found is None:
            found = self._engine.get_function_address(symbol) or self._engine.get_global_value_address(symbol)
            if not found:
                raise InternalError(
                    f"symbol {symbol} is not in the loaded code", expected="the name of a compiled kernel"
                )
            self._addresses[symbol] = found
        return found


@cache
def _target() -> llvm.Target:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_triple(TRIPLE)


@cache
def target_machine(isa: Isa) -> llvm.TargetMachine:
    """LLVM's description of the instruction set (rule PLAIN)."""
    return _target().create_target_machine(
        cpu=cpu_name(isa), features=isa.feature_text, opt=2, reloc="pic", codemodel="small"
    )


def _optimize(module: llvm.ModuleRef, machine: llvm.TargetMachine, level: Optimize) -> None:
    if level == "none":
        return
    tuning = llvm.PipelineTuningOptions(speed_level=2)
    tuning.loop_vectorization = tuning.slp_vectorization = tuning.loop_unrolling = tuning.loop_interleaving = False
    builder = llvm.create_pass_builder(machine, tuning)
    if level == "full":
        passes = builder.getModulePassManager()
        passes.run(module, builder)
        return
    light = llvm.create_new_function_pass_manager()
    light.add_instruction_combine_pass()
    light.add_simplify_cfg_pass()
    for function in module.functions:
        if not function.is_declaration:
            light.run(function, builder)


def _module(text: str, isa: Isa, optimize: Optimize, name: str) -> tuple[llvm.ModuleRef, llvm.TargetMachine]:
    machine = target_machine(isa)
    try:
        # A context of its own, so that the memory of types and constants goes when the module does.
        module = llvm.parse_assembly(text, context=llvm.create_context())
        module.triple = TRIPLE
        module.data_layout = str(machine.target_data)
        module.verify()
    except RuntimeError as e:
        raise InternalError(f"LLVM refuses the generated text: {e}", where=name, expected="valid LLVM IR") from e
    _optimize(module, machine, optimize)
    return module, machine


def compile_text(text: str, isa: Isa, optimize: Optimize = "full", name: str = "module") -> bytes:
    """One ELF object from the LLVM text of a module."""
    with _lock:
        module, machine = _module(text, isa, optimize, name)
        return bytes(machine.emit_object(module))


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


def _symbols(data: bytes) -> tuple[set[str], set[str]]:
    """The symbols that an ELF object defines, and those that it wants from others. Source: the ELF-64 specification."""
    if not data.startswith(_OBJECT_MAGIC):
        raise InternalError("compiled code cannot be loaded: it is no ELF object", hint="emptying the code cache")
    start = struct.unpack_from("<Q", data, 40)[0]
    size, count = struct.unpack_from("<HH", data, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, start + k * size) for k in range(count)]
    defined: set[str] = set()
    wanted: set[str] = set()
    for _, kind, _, _, offset, n_bytes, names, *_ in sections:
        if kind != _SYMBOL_TABLE:
            continue
        for at in range(offset + _SYMBOL_BYTES, offset + n_bytes, _SYMBOL_BYTES):
            name, _, _, section = struct.unpack_from("<IBBH", data, at)
            begin = sections[names][4] + name
            text = data[begin : data.index(b"\0", begin)].decode()
            (defined if section else wanted).add(text)
    return defined, wanted


def _require_symbols(objects: Sequence[bytes]) -> None:
    """Rule CLOSED: what is missing at load time would be called at address 0."""
    tables = [_symbols(data) for data in objects]
    wanted = set().union(*(w for _, w in tables)) - set().union(*(d for d, _ in tables))
    missing = sorted(name for name in wanted if not llvm.address_of_symbol(name))
    if missing:
        raise InternalError(f"generated code calls {', '.join(missing)}", expected="code that calls nothing")


def load(objects: Sequence[bytes]) -> Library:
    """Machine code in executable memory. No two objects may define the same symbol.

    Cost: about 2 ms for 50 kernels.
    Raises: InternalError for bytes that are no object; other damage is not found here: a cache checks its entries.
    """
    _require_symbols(objects)
    with _lock:
        machine = _target().create_target_machine(opt=2, reloc="pic", codemodel="small")
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly("", context=llvm.create_context()), machine)
        for data in objects:
            if not data.startswith(_OBJECT_MAGIC):
                raise InternalError(
                    "compiled code cannot be loaded: it is no ELF object", hint="emptying the code cache"
                )
            engine.add_object_file(llvm.ObjectFileRef.from_data(data))
        engine.finalize_object()
    return Library(engine)
