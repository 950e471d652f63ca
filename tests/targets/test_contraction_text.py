"""Arithmetic of sizes in generated code gives what the sizes are."""

from __future__ import annotations

import ctypes
import random

import numpy as np
import pytest

from vivace.base.dims import Dim, evaluate, maximum, minimum, symbol
from vivace.base.machine import isa
from vivace.targets.cpu import jit
from vivace.targets.cpu.contraction_text import Text

N, M = symbol("n", 0), symbol("m", 1)


def some_dim(rng: random.Random, depth: int = 3) -> Dim:
    """A sum whose parts may be negative."""
    if depth == 0:
        return rng.choice([N, M, rng.randint(-20, 20)])
    a, b = some_dim(rng, depth - 1), some_dim(rng, depth - 1)
    match rng.randrange(6):
        case 0:
            return a // rng.randint(1, 17)
        case 1:
            return a % rng.randint(1, 17)
        case 2:
            return minimum(a, b)
        case 3:
            return maximum(a, b)
        case 4:
            return a * rng.randint(-9, 9) + b
        case _:
            return a // M - b


def compiled(dims: list[Dim]) -> jit.Library:
    t = Text()
    for name, at in (("n", 0), ("m", 8)):
        t.put(f"%{name}.p = getelementptr i8, ptr %sizes, i64 {at}")
        t.put(f"%{name} = load i64, ptr %{name}.p")
    for i, d in enumerate(dims):
        value = t.dim(d, {"n": "%n", "m": "%m"})
        t.put(f"%out.{i} = getelementptr i64, ptr %results, i64 {i}")
        t.put(f"store i64 {value}, ptr %out.{i}")
    body = "\n".join(t.lines)
    text = f"define void @sizes(ptr %sizes, ptr %results) {{\nentry:\n{body}\n  ret void\n}}\n"
    return jit.load([jit.compile_text("\n".join(t.declares.values()) + "\n" + text, isa("sse"), "none")])


@pytest.mark.parametrize("seed", range(4))
def test_sizes_are_computed_as_they_are(seed: int) -> None:
    rng = random.Random(seed)
    strips = N * 4 + (15 - maximum(N * 8 - 1, 0) * 8) // 16 + 4  # the units of a strip, as they simplify
    dims = [strips, *(some_dim(rng) for _ in range(100))]
    library = compiled(dims)
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(library.address("sizes"))
    results = np.zeros(len(dims), np.int64)
    for n, m in [(0, 1), (1, 1), *((rng.randint(0, 99), rng.randint(1, 99)) for _ in range(20))]:
        sizes = np.array([n, m], np.int64)
        function(sizes.ctypes.data, results.ctypes.data)
        assert results.tolist() == [evaluate(d, {"n": n, "m": m}) for d in dims], (n, m)
