"""Large matrix products and ResNet-50 in int8 as shares of the measured peak, and where their cycles go: one thread.

Products have constant weights, bias and ReLU.

    python -m benchmarks.large                          # bf16 and int8; writes benchmarks/results/gemm.md and .json
    python -m benchmarks.large --dtype bf16 --seconds 4
    python -m benchmarks.large --dtype int8 --batch 16  # of ResNet-50, whose kernels the last table is of

The peak is that of a loop of nothing but products in registers. It, our kernel and OpenVINO's node (by its own
profiler) take turns in one process, so that each meets the same phases of the machine: on a core whose other thread is
awake tile registers run out, and loads of tiles and products take three times as long, which the peak does not show.

Rules:
* LOW: the 10th part of the times is compared, of the peak too: what the machine does while it is left alone.
* SPREAD: the lower quartile stands beside it, so that a machine that is seldom left alone shows.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from benchmarks.gemm import Layer, OpenVino, Ours, _float_problem, _int8_problem, _spec
from benchmarks.models import inputs
from benchmarks.models.quantized import materialise_quantized
from benchmarks.peak import Peak
from benchmarks.records import RESULTS, versions
from benchmarks.tile_work import HEAD, OPERATIONS, cells, least_ns, measure_model, work_of

from vivace.base.dtypes import DType
from vivace.base.machine import host
from vivace.loops.contraction import Contraction
from vivace.targets.cpu.amx import host_isa

SIZES = ((512, 512, 512), (1024, 512, 1024), (1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 1024))
QUANTILES = (10, 25)

LIMIT = """\
What it takes to come nearer to the peak: four products of tiles (32 x 32 results, one cache line of every row) read 4
KiB. From the first-level cache they run at the peak. With one operand there and the other from the second-level cache
they reach 0.85 of it, if the loads of the other are told not to stay (`tileloaddt1`); with both from the second-level
cache, which gives 90 GB/s, 0.6: so it is where a panel of 32 columns is larger than 32 KiB (512 steps of bf16, 1024 of
int8). Cutting these steps in passes moves 8 KiB of sums per pass and gains nothing, nor do six accumulators. Rows a
power of two of bytes apart, from 512 on, share few sets of the first-level cache: 64 bytes more between them would take
0.88 to 0.95 of the time. Results that are written cost another fifth: whole products of 512 x 512 x 512 in bf16 reach
0.7 with all of this. Where the other thread of the core is awake, none of these loops exceeds a third of the peak: tile
registers run out (rule FEW of `contraction_amx.py`). Hand-made loops, measured on Emerald Rapids.
"""

COLUMNS = """\
A kernel's calls together, at the lowest 10 % of its times. "of least" is the time that its instructions need at least
over what it takes: a product of tiles takes 16 cycles, a tile loaded 8, at the same time; a tile stored 16 more. Vector
instructions of 512 bits take one cycle each beside those, or half of one where no instruction on tiles is near: what is
less counts (loops of nothing else, Emerald Rapids). Bytes are those of the operands, each once. "full" is the
share of the multiplications that the result needs: the rest are rows and chunks that fill no tile register. Then
instructions per product of tiles, in micro-kernels: tiles loaded and stored, lines fetched, vectors, all others.
"""

NEEDED = """\
What it would take to come nearer: most cycles are not of products. The convolutions that widen to four times the
channels and add the residual take the most time, and need more vector instructions than products of so few steps hide
(the columns of instructions above): to f32, scaled and rounded at once, clipped by two, the residual to f32 by two, two
multiply-adds, rounded, narrowed: 11.5 for 16 results. None of it can go on beside products without taking twice as
long, since vector instructions among those on tiles are issued one a cycle: 12544 x 64 x 256 takes about 180 cycles for
the tiles of 32 x 32 results and then 370 for what follows. A clip in one instruction would save 30, a load of sums from
tile registers into vector registers 60; there are none. The 3 x 3 convolutions read panels of weights
that are larger than the first-level cache, and come near to what the second gives.
"""

Record = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large", description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", nargs="+", choices=("bf16", "int8"), default=["bf16", "int8"])
    parser.add_argument("--seconds", type=float, default=6.0, help="per size, and thrice for the model")
    parser.add_argument("--batch", type=int, default=8, help="images of the model; 0: without the model")
    options = parser.parse_args(arguments)
    records, model = [], None
    for dtype in options.dtype:
        for m, k, n in SIZES:
            records.append(measure(Layer(m, k, n, 0), dtype, options.seconds))
            print(*_row(records[-1]), flush=True)
    if options.batch:
        images = {key: np.concatenate([x] * options.batch) for key, x in inputs("resnet50").items()}
        path = materialise_quantized("resnet50", "qdq")
        model = measure_model(path, images, "int8", Peak("int8"), 3 * options.seconds)
        print(_about_model(model))
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "gemm.json").write_text(json.dumps({"products": records, "model": model}, indent=1) + "\n")
    (RESULTS / "gemm.md").write_text(markdown(records, model))
    return 0


def measure(layer: Layer, dtype: str, seconds: float) -> Record:
    """The speeds of one size in operations a ns, by contestant and quantile of the time."""
    isa = host_isa()
    problem = _int8_problem(layer) if dtype == "int8" else _float_problem(layer, DType(dtype))
    x = problem.x if dtype == "int8" else problem.x.astype(np.float32)
    spec, arrays = _spec(problem, isa)
    ours, peak = Ours(spec, arrays, isa), Peak(dtype)
    vino = OpenVino(problem.model, "bf16" if dtype == "bf16" else "f32")
    turns: dict[str, tuple[Callable[[], float], int]] = {
        "peak": (peak.time_ns, peak.n_operations),
        "vivace": (ours.time_ns, layer.flops),
        "openvino": (lambda: vino.time_ns(x), layer.flops),
    }
    times: dict[str, list[float]] = {name: [] for name in turns}
    end = time.perf_counter() + seconds
    while not times["peak"] or time.perf_counter() < end:
        for name, (one, _) in turns.items():
            one()  # brings its own data near again
            times[name] += [one(), one()]
    speeds = {
        name: {str(q): float(turns[name][1] / np.percentile(found, q)) for q in QUANTILES}
        for name, found in times.items()
    }
    assert isinstance(spec, Contraction)
    tiles = work_of(spec, isa)
    return {
        "size": f"{layer}", "dtype": dtype, "isa": isa.name, "machine": host().model, "speeds": speeds,
        "versions": versions(), "flops": layer.flops, "bytes": sum(x.nbytes for x in arrays.values()),
        "written": problem.out.nbytes, "work": tiles and asdict(tiles),
    }  # fmt: skip


def _share(r: Record, name: str, quantile: int) -> float:
    return float(r["speeds"][name][str(quantile)] / r["speeds"]["peak"][str(quantile)])


def _row(r: Record) -> list[str]:
    speeds = [f"{r['speeds'][name][str(QUANTILES[0])]:.0f}" for name in ("peak", "vivace", "openvino")]
    shares = [f"{_share(r, name, q):.0%}" for q in QUANTILES for name in ("vivace", "openvino")]
    return [r["size"], r["dtype"], *speeds, *shares]


def _about_model(r: Record) -> str:
    shares = [r["flops"] / r[f"{kind}ns"] / r[f"{kind}peak"] for kind in ("", "median_")]
    speeds = [r["batch"] / r[f"{kind}ns"] * 1e9 for kind in ("", "median_")]
    least = sum(least_ns(row, r["peak"], OPERATIONS["int8"]) for row in r["rows"])
    return (
        f"ResNet-50 in int8 (QDQ), batch {r['batch']}, {r['each']} images at a time: {speeds[0]:.0f} images a second "
        f"and {shares[0]:.0%} of the peak of {r['peak']:.0f} GOP/s at the lowest 10 % of the times, "
        f"{speeds[1]:.0f} and {shares[1]:.0%} of {r['median_peak']:.0f} at the median. "
        f"What its instructions need at least would be {r['flops'] / least / r['peak']:.0%}."
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows), ""]


def _of_product(r: Record) -> list[str]:
    low = str(QUANTILES[0])
    ns = r["flops"] / r["speeds"]["vivace"][low]
    kernel = {**r, "kernel": f"{r['dtype']} {r['size']}", "calls": 1, "ns": ns}
    return cells(kernel, ns, r["speeds"]["peak"][low], OPERATIONS[r["dtype"]])


def markdown(records: Sequence[Record], model: Record | None) -> str:
    """The tables."""
    machines = "; ".join(sorted({f"{r['machine']}, {r['isa']}" for r in records}))
    low, quartile = QUANTILES
    names = [f"{name} {q} %" for q in (low, quartile) for name in ("vivace", "openvino")]
    head = ["product", "type", "peak GOP/s", "vivace", "openvino", *names]
    lines = [
        "# Large matrix products",
        "",
        f"{machines}; 1 thread. Made by `python -m benchmarks.large`. Speeds are of the lowest {low} % of the times,",
        f"shares of the peak at the same quantile, the lowest {low} % and {quartile} %.",
        "",
        *_table(head, map(_row, records)),
        LIMIT,
        "## Where the cycles go",
        "",
        COLUMNS,
        *_table(HEAD, map(_of_product, records)),
    ]
    if model:
        kernels = sorted(model["rows"], key=lambda row: -row["ns"])
        total = sum(row["ns"] for row in kernels)
        shown = [row for row in kernels if row["ns"] > total / 200]
        lines += [
            _about_model(model), "",
            *_table(HEAD, [cells(row, total, model["peak"], OPERATIONS["int8"]) for row in shown]), NEEDED,
        ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
