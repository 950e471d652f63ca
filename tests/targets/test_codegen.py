"""Kernels of a plan, generated and compiled several at once."""

from __future__ import annotations

import time

import onnx.parser
import pytest

import vivace
from vivace.targets.cpu import codegen, jit
from vivace.targets.cpu.code import KernelCode


def model(n_kernels: int) -> onnx.ModelProto:
    """Transposes, which nothing joins, of vectors of other lengths."""
    sizes = range(3, 3 + n_kernels)
    ins, outs = (", ".join(f"float[{n}, 5] {name}{n}" for n in sizes) for name in "xy")
    outs = outs.replace(", 5]", "]").replace("float[", "float[5, ")
    nodes = " ".join(f"y{n} = Transpose<perm = [1, 0]>(x{n})" for n in sizes)
    return onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 17]> net ({ins}) => ({outs}) {{ {nodes} }}')


def test_progress_ends_with_the_last_kernel() -> None:
    told: list[tuple[int, int]] = []
    engine = vivace.compile(
        model(4), threads=1, cache=False,
        progress=lambda stage, done, total: told.append((done, total)) if stage == "compile" else None,
    )  # fmt: skip
    n = engine.stats["n_kernels"]
    assert isinstance(n, int) and n >= 4
    assert told == sorted(told) and told[-1] == (n, n) and {total for _, total in told} == {n}


def test_an_interrupt_waits_for_no_kernel_that_has_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    def compile_kernel(code: KernelCode, isa: object) -> bytes:
        begun.append(code.name)
        if len(begun) == 1:
            raise KeyboardInterrupt
        time.sleep(0.3)
        return b""

    monkeypatch.setattr(jit, "compile_kernel", compile_kernel)
    monkeypatch.setattr(codegen, "_MOST_THREADS", 1)
    with pytest.raises(KeyboardInterrupt):
        vivace.compile(model(12), threads=1, cache=False)
    assert len(begun) <= 4
