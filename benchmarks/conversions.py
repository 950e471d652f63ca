"""What conversions cost as passes of their own: the figures of `vivace/base/conversions.py`.

    python -m benchmarks.conversions

Prints, for each kind and size, picoseconds per element on one thread: the lower quintile of profiled runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import numpy as np

import vivace
from vivace.base.dtypes import DType
from vivace.graph.build import Builder
from vivace.graph.graph import Type, Value

SHAPES = ((1, 64, 14, 14), (1, 3, 224, 224), (1, 64, 56, 56), (1, 512, 56, 56))
N_RUNS = 60
Make = Callable[[Builder, Value], Value]


def kinds() -> Iterator[tuple[str, DType, Make]]:
    """Name, format of the operand, and the conversion."""
    for dtype in (DType.f32, DType.bf16, DType.u8):
        yield f"{dtype} to channels last", dtype, lambda b, x: b.transpose(x, perm=(0, 2, 3, 1))
        yield f"{dtype} to the end", dtype, lambda b, x: b.transpose(x, perm=(0, 3, 1, 2))
    yield "f32 to bf16", DType.f32, lambda b, x: b.cast(x, to=DType.bf16)
    yield "bf16 to f32", DType.bf16, lambda b, x: b.cast(x, to=DType.f32)
    yield "f32 to bf16, channels last", DType.f32, lambda b, x: b.cast(b.transpose(x, perm=(0, 2, 3, 1)), to=DType.bf16)
    yield "bf16 to f32, to the end", DType.bf16, lambda b, x: b.cast(b.transpose(x, perm=(0, 3, 1, 2)), to=DType.f32)
    yield "quantize, channels last", DType.f32, lambda b, x: _quantize(b, b.transpose(x, perm=(0, 2, 3, 1)))
    yield "dequantize, to the end", DType.u8, lambda b, x: _dequantize(b, b.transpose(x, perm=(0, 3, 1, 2)))
    yield "quantize", DType.f32, _quantize
    yield "dequantize", DType.u8, _dequantize


def _quantize(b: Builder, x: Value) -> Value:
    return b.quantize(x, b.const(np.float32(0.5)), b.const(np.uint8(3)))


def _dequantize(b: Builder, x: Value) -> Value:
    return b.dequantize(x, b.const(np.float32(0.5)), b.const(np.uint8(3)))


def ps_per_element(make: Make, dtype: DType, shape: tuple[int, ...]) -> float:
    """Of a graph that does nothing else."""
    b = Builder()
    x = b.input("x", Type(dtype, shape))
    engine = vivace.compile(b.finish((make(b, x),)), threads=1, level=0)
    feed = {"x": np.random.default_rng(0).integers(0, 9, shape).astype(dtype.numpy)}
    times = [sum(event.duration_ns for event in engine.profile(feed)) for _ in range(N_RUNS)]
    return float(np.quantile(times, 0.2)) * 1e3 / float(np.prod(shape))


def main() -> int:
    print(f"{'ps per element':26}", *(f"{'x'.join(map(str, s)):>14}" for s in SHAPES))
    for name, dtype, make in kinds():
        print(f"{name:26}", *(f"{ps_per_element(make, dtype, shape):14.0f}" for shape in SHAPES))
    return 0


if __name__ == "__main__":
    sys.exit(main())
