"""Objects are placed, joined and protected without LLVM."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from vivace.base.errors import InternalError
from vivace.base.machine import ISAS
from vivace.targets.cpu import elf
from vivace.targets.cpu.jit import compile_text

# A constant of the read-only section, a table of addresses, a variable, and a function of the object's own.
TEXT = """
@calls = internal global i64 40
@table = internal constant [2 x ptr] [ptr @double, ptr @triple]

define internal double @double(double %x) noinline {
  %y = fmul double %x, 2.0
  ret double %y
}
define internal double @triple(double %x) noinline {
  %y = fmul double %x, 3.0
  ret double %y
}
define double @choose(i64 %which, double %x) {
  %n = load i64, ptr @calls
  %n1 = add i64 %n, 1
  store i64 %n1, ptr @calls
  %slot = getelementptr [2 x ptr], ptr @table, i64 0, i64 %which
  %f = load ptr, ptr %slot
  %y = call double %f(double %x)
  ret double %y
}
define i64 @count() {
  %n = load i64, ptr @calls
  ret i64 %n
}
"""
OTHER = """
declare double @choose(i64, double)
define double @through(double %x) {
  %y = call double @choose(i64 1, double %x)
  %z = fadd double %y, 0.5
  ret double %z
}
"""


@pytest.fixture(scope="module")
def objects() -> list[bytes]:
    return [compile_text(text, ISAS["sse"], "none") for text in (TEXT, OTHER)]


def test_constants_tables_variables_and_calls(objects: list[bytes]) -> None:
    library = elf.load(objects)
    choose = ctypes.CFUNCTYPE(ctypes.c_double, ctypes.c_int64, ctypes.c_double)(library.address("choose"))
    count = ctypes.CFUNCTYPE(ctypes.c_int64)(library.address("count"))
    through = ctypes.CFUNCTYPE(ctypes.c_double, ctypes.c_double)(library.address("through"))
    assert (choose(0, 5.0), choose(1, 5.0), through(1.0), count()) == (10.0, 15.0, 3.5, 43)
    assert elf.load(objects[:1]).address("choose") != library.address("choose")


def test_pages_are_writable_or_executable_never_both(objects: list[bytes]) -> None:
    library = elf.load(objects)
    address = library.address("choose")
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    rights = {line[1] for line in lines if int(line[0].split("-")[0], 16) <= address < int(line[0].split("-")[1], 16)}
    assert rights == {"r-xp"}


def test_a_symbol_that_nobody_defines(objects: list[bytes]) -> None:
    with pytest.raises(InternalError, match="calls choose"):
        elf.load(objects[1:])


def test_a_symbol_that_is_there_twice(objects: list[bytes]) -> None:
    with pytest.raises(InternalError, match="defined twice"):
        elf.load([objects[0], objects[0]])


@pytest.mark.parametrize("data", [b"", b"\x7fELF", b"\x7fELF\x02\x01" + bytes(100), b"MZ" * 100])
def test_bytes_that_are_no_object(data: bytes) -> None:
    with pytest.raises(InternalError, match="no ELF object"):
        elf.load([data])


def test_loading_needs_no_llvm(objects: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "code.o"
    path.write_bytes(objects[0])
    script = (
        "import sys; from pathlib import Path; from vivace.targets.cpu import jit\n"
        "import vivace.runtime.engine\n"
        "library = jit.load([Path(sys.argv[1]).read_bytes()])\n"
        "print(library.address('count') > 0, 'llvmlite.binding' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
