"""Compiling and loading: objects are bytes that another process can load, names resolve, faults are errors and not
crashes."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vivace.base.errors import InternalError
from vivace.base.machine import ISAS
from vivace.targets.cpu import jit
from vivace.targets.cpu.code import KernelCode

ISA = ISAS["sse"]
TEXT = """
define void @NAME(ptr %args, i64 %begin, i64 %end, ptr %scratch) {
  %p = load ptr, ptr %args
  %x = load double, ptr %p
  %y = fadd double %x, 1.5
  store double %y, ptr %p
  ret void
}
"""
RUN = """
import ctypes, sys
from pathlib import Path
from vivace.targets.cpu import jit
library = jit.load([Path(sys.argv[1]).read_bytes()])
cell = ctypes.c_double(40.5)
word = ctypes.c_void_p(ctypes.addressof(cell))
ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 4)(library.address("add"))(ctypes.byref(word), 0, 1, 0)
print(cell.value)
"""


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "compile_text", jit.compile_text.__wrapped__)  # type: ignore[attr-defined]


def code(name: str, text: str = TEXT) -> KernelCode:
    return KernelCode(name, text.replace("NAME", name), (), ())


def call(library: jit.Library, name: str) -> float:
    cell = np.array([1.0])
    word = np.array([cell.ctypes.data])
    ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 4)(library.address(name))(word.ctypes.data, 0, 1, 0)
    return float(cell[0])


@pytest.mark.parametrize("optimize", ["none", "light", "full"])
def test_kernels_are_compiled_and_called(optimize) -> None:
    objects = jit.compile_objects([code("one"), code("two")], ISA, optimize)
    library = jit.load(objects)
    assert call(library, "one") == call(library, "two") == 2.5


def test_an_object_runs_in_another_process(tmp_path: Path) -> None:
    path = tmp_path / "add.o"
    path.write_bytes(jit.compile_kernel(code("add"), ISA))
    result = subprocess.run([sys.executable, "-c", RUN, path], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "42.0"


def test_the_same_text_gives_the_same_object() -> None:
    assert jit.compile_kernel(code("same"), ISA) == jit.compile_kernel(code("same"), ISA)


def test_threads_compile_what_one_thread_compiles() -> None:
    codes = [replace(code(f"add{i}"), optimize=o) for i in range(6) for o in ("none", "light", "full")]
    alone = [jit.compile_kernel(c, ISA) for c in codes]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda c: jit.compile_kernel(c, ISA), codes)) == alone


def test_the_key_depends_on_what_the_object_depends_on() -> None:
    first = code("first")
    keys = {
        jit.object_key(first, ISA),
        jit.object_key(first, ISAS["avx2"]),
        jit.object_key(replace(first, optimize="none"), ISA),
        jit.object_key(code("second"), ISA),
    }
    assert len(keys) == 4
    assert jit.object_key(first, ISA) == jit.object_key(code("first"), ISA)


def test_several_libraries_may_define_one_name() -> None:
    changed = code("same", TEXT.replace("1.5", "2.5"))
    first, second = (jit.load(jit.compile_objects([c], ISA)) for c in (code("same"), changed))
    assert (call(first, "same"), call(second, "same")) == (2.5, 3.5)


def test_an_unknown_symbol_is_an_error() -> None:
    with pytest.raises(InternalError, match="symbol nothing is not in the loaded code"):
        jit.load([]).address("nothing")


def test_text_that_llvm_refuses_is_an_error() -> None:
    with pytest.raises(InternalError, match="bad: LLVM refuses the generated text"):
        jit.compile_kernel(code("bad", "define void @NAME() { ret i32 0 }"), ISA)


def test_bytes_that_are_no_object_are_an_error() -> None:
    with pytest.raises(InternalError, match="no ELF object"):
        jit.load([b"nothing of the kind"])


def test_code_that_calls_what_is_not_there_is_an_error() -> None:
    text = "declare void @nobody_defines_this()\ndefine void @NAME() {\n call void @nobody_defines_this()\n ret void\n}"
    with pytest.raises(InternalError, match="calls nobody_defines_this"):
        jit.load(jit.compile_objects([code("caller", text)], ISA))


def test_assembly_uses_the_instruction_set() -> None:
    text = """
    define void @add(ptr %p) {
      %x = load <16 x float>, ptr %p, align 4
      %y = fadd <16 x float> %x, %x
      store <16 x float> %y, ptr %p, align 4
      ret void
    }
    """
    assert "zmm" in jit.assembly(text, ISAS["avx512"])
    assert "ymm" in jit.assembly(text, ISAS["avx2"]) and "zmm" not in jit.assembly(text, ISAS["avx2"])
    assert "ymm" not in jit.assembly(text, ISAS["sse"])
