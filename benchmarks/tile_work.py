"""Where the cycles of tile kernels go: products and loads of tiles and other instructions, read off their assembly.

`python -m benchmarks.large` writes its tables.

Rules:
* BLOCKS: an instruction counts as often as its loop turns. Loops around products turn once per chunk of K, all others
  of a micro-kernel once per row of its tile (the epilogue). The driver, some sixty instructions per tile, is left out.
* UNITS: products of tiles take 16 cycles and loads of tiles 8, at the same time; stores of tiles 16 more. Vector
  instructions of 512 bits take a cycle each among those, beside them, or half a cycle each in a stretch of their own
  (measured in loops on Emerald Rapids: rule LONGER of `contraction_waiting`).
* LINES: kernels are told apart by their machine code; a row of the table is all the calls of one of them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import vivace
from vivace.base.dims import evaluate, prod
from vivace.base.machine import Isa
from vivace.building import apply_precision, make_plan, optimize_for_native
from vivace.compilation import load_graph
from vivace.loops.contraction import Contraction, contraction_dims, contraction_params, merge_axes
from vivace.lower.arithmetic import arithmetic_of, chunk_bytes
from vivace.lower.plan import Spec, Step, steps_of
from vivace.lower.tile import choose_tile
from vivace.measure.roofline import layers
from vivace.optimize.pipeline import optimize
from vivace.targets.cpu import jit
from vivace.targets.cpu.amx import host_isa
from vivace.targets.cpu.codegen import emit
from vivace.targets.cpu.contraction_plan import Plan, symbol_of, variants

QUANTILE = 10  # rule LOW of `large`
OPERATIONS = {"int8": 2 * 16 * 16 * 64, "bf16": 2 * 16 * 16 * 32, "f32": 2}  # of a product of full tiles, or one of f32
PRODUCTS = ("conv", "matmul", "attention", "conv_integer", "matmul_integer")
Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Work:
    """Instructions that a kernel executes, by kind; `scalar` are all that are none of the others."""

    products: int = 0
    loads: int = 0
    stores: int = 0
    fetches: int = 0
    vector: int = 0
    scalar: int = 0

    @property
    def cycles(self) -> float:
        """The least that a core needs (rule UNITS)."""
        tiles = max(16 * self.products, 8 * self.loads) + 16 * self.stores
        return min(max(tiles, self.vector), tiles + self.vector / 2)

    def plus(self, other: Work, times: int = 1) -> Work:
        return Work(*(a + times * b for a, b in zip(astuple(self), astuple(other), strict=True)))


def work_of(spec: Contraction, isa: Isa) -> Work | None:
    """What one run of a kernel executes; None where it multiplies no tiles or its sizes are open."""
    c = merge_axes(spec)
    arithmetic, tile = arithmetic_of(c, isa), choose_tile(spec, isa)
    if not arithmetic.is_tile:
        return None
    plan = Plan("kernel", c, isa, arithmetic, tile, contraction_params(c), contraction_dims(c))
    code = emit(spec, isa)
    lines = jit.assembly(code.llvm_text, isa, code.optimize).split("\n")
    above = prod([x.extent for x in (*c.batch, *plan.above)])
    n_chunks = prod([*(x.extent for x in c.taps[:-1]), plan.run_bytes // chunk_bytes(plan.run_bytes)])
    total = Work()
    for outer, inner, tail in variants(plan):
        pieces = [sum(n for n, size in split if size == s) for split, s in ((tile.outer, outer), (tile.inner, inner))]
        panels = 1 if tail else c.n // tile.lanes
        n_calls = above * pieces[0] * pieces[1] * panels
        if not isinstance(n_calls, int) or not isinstance(n_chunks, int):
            return None
        name = symbol_of(plan, outer, inner, tail).replace("kernel", code.name, 1)
        total = total.plus(_of_function(_function(lines, name), n_chunks, outer * inner), n_calls)
    return total


def _function(lines: Sequence[str], name: str) -> list[str]:
    start = lines.index(f"{name}:")
    return list(lines[start + 1 : next(i for i in range(start, len(lines)) if ".size" in lines[i])])


def _of_function(lines: Sequence[str], n_chunks: int, n_rows: int) -> Work:
    """Rule BLOCKS, for one micro-kernel."""
    loops = _loops(lines)
    multiply = [j for j in loops if any("\ttdp" in line for line in lines[j[0] : j[1]])]
    total = Work()
    for i, line in enumerate(lines):
        if not re.match(r"\t[a-z]", line):
            continue
        loop = next((j for j in loops if j[0] <= i <= j[1]), None)
        times = 1 if loop is None else n_rows if loop not in multiply else n_chunks if loop == multiply[0] else 1
        total = total.plus(_one(line.split()[0]), times)
    return total


def _loops(lines: Sequence[str]) -> list[tuple[int, int]]:
    """First and last lines of the loops, inner ones before those around them."""
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\.L\w+):", line))}
    jumps = [(labels[m[1]], i) for i, line in enumerate(lines) if (m := re.match(r"\tj\w+\t(\.L\w+)", line))]
    return sorted((j for j in jumps if j[0] <= j[1]), key=lambda j: j[1] - j[0])


_KINDS = (
    ("tdp", "products"), ("tileload", "loads"), ("tilestore", "stores"), ("prefetch", "fetches"), ("v", "vector")
)  # fmt: skip


def _one(instruction: str) -> Work:
    return Work(**{next((kind for start, kind in _KINDS if instruction.startswith(start)), "scalar"): 1})


def measure_model(
    path: Path, arrays: Mapping[str, np.ndarray], precision: str, time_peak: Callable[[], float], seconds: float
) -> Record:
    """Times and work of the kernels of a model on one thread, per call of the engine; `int8` are quantized models.
    `time_peak` gives the speed of a loop of nothing but products, in operations a ns, each time that it is called."""
    isa, batch = host_isa(), len(next(iter(arrays.values())))
    arithmetic = "f32" if precision == "int8" else precision
    shapes = {key: x.shape for key, x in arrays.items()}
    engine = vivace.compile(path, threads=1, shapes=shapes, precision=arithmetic)
    assert isinstance(engine, vivace.Engine)
    lines = engine.image.lines
    each = engine.image.batch.each or batch if engine.image.batch else batch
    few = {key: (each, *x.shape[1:]) for key, x in arrays.items()}
    graph, _ = apply_precision(optimize_for_native(load_graph(path, few)), arithmetic, isa)
    steps = steps_of(make_plan(graph, isa, ("native",)).body)
    assert [s.label for s in steps] == [line.label for line in lines]
    times: list[list[float]] = [[] for _ in lines]
    whole: list[int] = []
    peaks: list[float] = []
    end = time.perf_counter() + seconds
    while not whole or time.perf_counter() < end:
        peaks.append(time_peak())
        start = time.perf_counter_ns()
        engine.run(arrays)
        whole.append(time.perf_counter_ns() - start)
        taken = [0.0] * len(lines)
        for event in engine.profile(arrays):
            taken[int(event.kernel.split(":")[0])] += event.duration_ns
        for of_line, ns in zip(times, taken, strict=True):
            of_line.append(ns)
    rows: dict[int, Record] = {}
    calls = -(-batch // each)
    for line, step, found in zip(lines, steps, times, strict=True):
        if line.kernel not in rows:
            tiles = work_of(step.spec, isa) if isinstance(step.spec, Contraction) else None
            rows[line.kernel] = {
                "kernel": _name(step), "calls": 0, "ns": 0.0, "flops": 0, "bytes": 0, "written": 0,
                "work": tiles and asdict(tiles), "turn": None if tiles else turn_of(step.spec, isa),
            }  # fmt: skip
        row = rows[line.kernel]
        row["calls"] += calls
        row["ns"] += float(np.percentile(found, QUANTILE))
        row["flops"] += calls * _operations(step)
        row["bytes"] += calls * evaluate(step.bytes, {})
        row["written"] += calls * _written(step)
    work = layers(optimize(load_graph(path, shapes)), {}, arithmetic)
    return {
        "batch": batch, "each": each, "isa": isa.name, "rows": list(rows.values()),
        "flops": sum(x.flops for x in work if x.op in PRODUCTS),
        "peak": float(np.percentile(peaks, 100 - QUANTILE)), "ns": float(np.percentile(whole, QUANTILE)),
        "median_peak": float(np.median(peaks)), "median_ns": float(np.median(whole)),
    }  # fmt: skip


def turn_of(spec: Spec, isa: Isa) -> list[int] | None:
    """Multiply-adds of vectors in one turn of the innermost loop that has most of them, and all instructions there;
    None where a kernel has none."""
    code = emit(spec, isa)
    lines = jit.assembly(code.llvm_text, isa, code.optimize).split("\n")
    found: list[list[int]] = []
    for first, last in _loops(lines):
        here = [line.split()[0] for line in lines[first : last + 1] if re.match(r"\t[a-z]", line)]
        is_inner = not any(first <= a and b <= last and (a, b) != (first, last) for a, b in _loops(lines))
        if is_inner and (n := sum(x.startswith("vfm") for x in here)):
            found.append([n, len(here)])
    return max(found, default=None)


def _name(step: Step) -> str:
    """A contraction with its rows, steps and columns."""
    c = step.spec
    if not isinstance(c, Contraction):
        return step.label
    return f"{step.label} {prod([x.extent for x in (*c.batch, *c.rows)])} x {prod([x.extent for x in c.taps])} x {c.n}"


def _operations(step: Step) -> int:
    """Of a contraction without what follows its sums."""
    if not isinstance(step.spec, Contraction):
        return evaluate(step.flops, {})
    return 2 * _results(step.spec) * evaluate(prod([x.extent for x in step.spec.taps]), {})


def _written(step: Step) -> int:
    if not isinstance(step.spec, Contraction):
        return min(evaluate(step.bytes, {}), sum(evaluate(s.bytes, {}) for s in step.writes))
    return _results(step.spec) * step.spec.out.dtype.size_bytes


def _results(c: Contraction) -> int:
    return evaluate(prod([c.n, *(x.extent for x in (*c.batch, *c.rows))]), {})


HEAD = [
    "kernel", "calls", "of time", "GOP", "of peak", "of least", "MB read", "MB written", "products of tiles", "full",
    "loads", "stores", "fetches", "vector", "scalar",
]  # fmt: skip


def least_ns(r: Record, peak: float, n_product: int) -> float:
    """What the instructions of a kernel need at least, with as many operations a product of full tiles."""
    return r["calls"] * Work(**r["work"]).cycles * n_product / 16 / peak if r["work"] else float(r["ns"])


def cells(r: Record, ns: float, peak: float, n_product: int) -> list[str]:
    """One row of a table: a kernel that took its part of `ns`. Instructions are per product of tiles."""
    work = r["work"]
    found = [
        r["kernel"], str(r["calls"]), f"{r['ns'] / ns:.1%}", f"{r['flops'] / 1e9:.3g}",
        f"{r['flops'] / r['ns'] / peak:.0%}", f"{least_ns(r, peak, n_product) / r['ns']:.0%}" if work else "-",
        f"{(r['bytes'] - r['written']) / 1e6:.1f}", f"{r['written'] / 1e6:.1f}",
    ]  # fmt: skip
    if work is None:
        return [*found, *["-"] * 7]
    n = work["products"] * r["calls"]
    each = [f"{work[kind] / work['products']:.1f}" for kind in Work.__slots__[1:]]
    return [*found, str(n), f"{r['flops'] / n / n_product:.0%}", *each]
