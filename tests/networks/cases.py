"""Random models, compiled in random ways, against the reference.

    python -m tests.networks.cases 0 1000      seeds 0 to 999, each with a time limit, a line each

One compile serves all sizes and numbers of threads. Results are compared with the model's meaning, and with the meaning
of what is compiled, in which halves are rounded; memory between runs holds garbage; inputs and outputs end where a page
ends that nobody may touch beyond. Of some the bits are compared with those of a plan whose values lie apart between
guards, and with those of an engine in which nothing is joined, whose every kernel is checked.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random

import numpy as np
from tests import races
from tests.lower.harness import run_plan
from tests.networks.maker import Array
from tests.networks.models import make
from tests.networks.ways import Way, on, quantized, some_way

import vivace
from vivace.base.dtypes import DType
from vivace.base.knobs import knobs
from vivace.building import make_plan, optimize_for_native
from vivace.graph import reference
from vivace.graph.graph import Graph
from vivace.lower.lowering import OPTIONS
from vivace.lower.plan import Plan
from vivace.lower.precision import narrow
from vivace.onnx.importer import import_model
from vivace.options import choose_isa
from vivace.runtime.engine import Engine

JOINING = ("strips", "row_blocks", "in_place")
# Of the largest value. Errors of networks grow from layer to layer; what a wrong kernel makes is mostly of that size.
TOLERANCE = {"f32": 1e-3, "bf16": 0.1, "f16": 0.02, "int8": 0.12}
LIMIT_S = 300


def check(seed: int) -> str:
    """Raises: AssertionError, or whatever a compile or a run raises. Returns what was tried, or why not."""
    random = Random(seed)
    model, m = make(random)
    way = some_way(random)
    if way.precision == "int8":
        made = quantized(model, m, random)
        if made is None:
            return "not quantized"
        model = made
    graph = import_model(model)
    runs = []
    for sizes in m.sizes:
        feed = m.feed(sizes)
        try:
            runs.append((feed, meaning(graph, feed)))
        except Exception:
            if all(sizes.values()):
                raise
            continue  # the model does not take a size of zero
    shapes = {name: x.shape for name, x in runs[0][0].items()} if runs and random.random() < 0.2 else None
    runs = runs[:1] if shapes else runs
    with on(way):
        engine = vivace.compile(model, disable=way.disable, shapes=shapes, **way.options)  # type: ignore[arg-type]
        assert isinstance(engine, Engine)
        lowered = rounded(graph, way)
        pair = Engine(engine.image, random.choice((1, 2, 3)), ())
        plan = plain = None
        if not shapes and random.random() < 0.4:
            without = frozenset(way.disable) & OPTIONS.keys()
            plan = make_plan(lowered, choose_isa(way.target), ("native",), without, threads=way.threads)
        if random.random() < (0.6 if way.precision == "int8" else 0.4):
            with knobs.scope(check=random.random() < 0.7):
                plain = vivace.compile(model, disable=(*way.disable, *JOINING), shapes=shapes, **way.options)  # type: ignore[arg-type]
        for feed, want in runs:
            where = f"{way.precision} { {name: x.shape for name, x in feed.items()} }"
            got = run(engine, pair, feed, where)
            compare(got, want, way.precision, 1.0, f"{where} against the model")
            if way.precision != "f32":
                compare(got, meaning(lowered, feed), way.precision, 0.5, f"{where} against what is compiled")
            if plan is not None:
                bits(run_apart(plan, feed, way), got, f"{where}, between guards")
            if plain is not None:
                other = plain.run(feed)
                if way.precision == "bf16":  # a block of few rows is multiplied in vectors, many in tiles
                    compare(other, list(got.values()), way.precision, 0.5, f"{where}, nothing joined")
                else:
                    bits(other, got, f"{where}, nothing joined")
    labels = [line.label for line in engine.image.lines if line.kind == "run"]
    told = sorted({x for x in labels if x in ("strips", "row_blocks", "attention") or "winograd" in x})
    told += ["slices"] if engine.image.batch else []
    return f"{len(m.nodes)} nodes, {way.precision}, {way.target[:12]}, {len(runs)} sizes: {' '.join(told)}"


def meaning(graph: Graph, feed: Mapping[str, Array]) -> list[Array]:
    with np.errstate(all="ignore"):
        return reference.evaluate(graph, feed)


def rounded(graph: Graph, way: Way) -> Graph:
    """What is compiled, with the roundings of its format."""
    made = optimize_for_native(graph, way.level, [x for x in way.disable if x not in OPTIONS])
    return narrow(made, DType(way.precision)).graph if way.precision in ("bf16", "f16") else made


def run(engine: Engine, pair: Engine, feed: Mapping[str, Array], where: str) -> dict[str, Array]:
    """The outputs; those of the other engine, on other threads, must be the same."""
    keep: list[object] = []
    given = {name: guarded(x, keep) for name, x in feed.items()}
    got = engine.run(given)
    for e in (engine, pair):
        races.spoil(e)
    outputs = {name: guarded(np.full_like(y, 7), keep) for name, y in got.items()}
    bits(pair.run(given, outputs), got, f"{where}, on {pair.threads} threads")
    races.spoil(engine)
    return got


def run_apart(plan: Plan, feed: Mapping[str, Array], way: Way) -> dict[str, Array]:
    """Kernel by kernel."""
    dims = reference.bind((v, feed[v.name].shape) for v in plan.inputs)
    results = run_plan(plan, [feed[v.name] for v in plan.inputs], dims, choose_isa(way.target).name)
    return {v.name: y for v, y in zip(plan.outputs, results, strict=True)}


def guarded(array: Array, keep: list[object]) -> Array:
    """The same, at the end of a page behind which nothing may be read or written."""
    page = mmap.PAGESIZE
    n_pages = -(-array.nbytes // page) + 1
    memory = mmap.mmap(-1, n_pages * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None).mprotect
    protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    assert protect(start + (n_pages - 1) * page, page, 0) == 0
    keep.append(memory)
    begin = (n_pages - 1) * page - array.nbytes
    made = np.frombuffer(memory, np.uint8, array.nbytes, begin).view(array.dtype).reshape(array.shape)
    made[...] = array
    return made


def compare(got: Mapping[str, Array], want: Sequence[Array], precision: str, share: float, where: str) -> None:
    """Within a share of the tolerance. Of bytes, none stands for NaN, and a few may be others: what rounds to its
    neighbour early on may be far away in the end.
    """
    for (name, y), w in zip(got.items(), want, strict=True):
        assert (y.shape, y.dtype) == (w.shape, w.dtype), f"{where}: {name} is {y.dtype}{y.shape}"
        a, b = y.astype(np.float64), w.astype(np.float64)
        largest = float(np.abs(b[np.isfinite(b)]).max(initial=1e-6 if precision == "f32" else 0.1))
        with np.errstate(invalid="ignore"):
            near = np.abs(a - b) <= TOLERANCE[precision] * share * largest
        bad = ~((a == b) | (np.isnan(a) & np.isnan(b)) | near)
        if precision == "int8":
            steps = np.diff(np.unique(b[np.isfinite(b)]))
            with np.errstate(invalid="ignore"):
                bad &= np.abs(a - b) > 3 * steps.min(initial=largest, where=steps > 1e-4 * largest)
        if bad.sum() > (0.05 * bad.size if precision == "int8" else 0):
            at = tuple(int(k[0]) for k in np.nonzero(bad))
            raise AssertionError(
                f"{where}: {int(bad.sum())} of {bad.size} in {name} {y.shape} are wrong, first at {at}: {a[at]} "
                f"instead of {b[at]}, at worst by {float(np.nanmax(np.abs(a - b))) / largest:.2g} of the largest"
            )


def bits(got: Mapping[str, Array], want: Mapping[str, Array], where: str) -> None:
    for name, w in want.items():
        same = (got[name] == w) | ((got[name] != got[name]) & (w != w))
        assert same.all(), f"{where}: {int((~same).sum())} of {same.size} in {name} {w.shape} have other bits"


def main(first: int, last: int, check: Callable[[int], str] = check) -> None:
    faulthandler.enable()
    for seed in range(first, last):
        faulthandler.dump_traceback_later(LIMIT_S, exit=True)
        print(seed, end=" ", flush=True)
        start = time.process_time()
        try:
            print("ok", check(seed), f"{time.process_time() - start:.1f} s of a core", flush=True)
        except Exception as e:
            print("FAULT", type(e).__name__, " ".join(str(e).split())[:500], flush=True)
            at = reversed(traceback.extract_tb(e.__traceback__)[-6:])
            print("   ", " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in at), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
