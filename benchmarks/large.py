"""Large matrix products as shares of the measured peak, beside OpenVINO: one thread, weights constant, bias and ReLU.

    python -m benchmarks.large                          # bf16 and int8; writes benchmarks/results/gemm.md and .json
    python -m benchmarks.large --dtype bf16 --seconds 4

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
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from benchmarks.gemm import Layer, OpenVino, Ours, _float_problem, _int8_problem, _spec
from benchmarks.times import RESULTS, versions

from vivace.base.dtypes import DType
from vivace.base.machine import host
from vivace.lower.pack import aligned_zeros
from vivace.targets.cpu.amx import host_isa
from vivace.targets.cpu.peaks import n_operations, peak_kernels

SIZES = ((512, 512, 512), (1024, 512, 1024), (1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 1024))
_PEAK_REPEATS = 200  # about 60 us
QUANTILES = (10, 25)

LIMIT = """\
What it takes to come nearer to the peak: four products of tiles (32 x 32 results, one cache line of every row) read 4
KiB. From the first-level cache they run at the peak. With one operand there and the other from the second-level cache
they reach 0.85 of it, if the loads of the other are told not to stay (`tileloaddt1`); with both from the second-level
cache, which gives 90 GB/s, 0.6: so it is where a panel of 32 columns is larger than 32 KiB (512 steps of bf16, 1024 of
int8). Cutting these steps in passes moves 8 KiB of sums per pass and gains nothing, nor do six accumulators. Results
that are written cost another fifth. Where the other thread of the core is awake, none of these loops exceeds a third
of the peak: tile registers run out (rule FEW of `contraction_amx.py`). Hand-made loops, measured on Emerald Rapids.
"""

Record = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large", description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", nargs="+", choices=("bf16", "int8"), default=["bf16", "int8"])
    parser.add_argument("--seconds", type=float, default=6.0, help="per size")
    options = parser.parse_args(arguments)
    records = []
    for dtype in options.dtype:
        for m, k, n in SIZES:
            records.append(measure(Layer(m, k, n, 0), dtype, options.seconds))
            print(_row(records[-1]), flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "gemm.json").write_text(json.dumps(records, indent=1) + "\n")
    (RESULTS / "gemm.md").write_text(markdown(records))
    return 0


def measure(layer: Layer, dtype: str, seconds: float) -> Record:
    """The speeds of one size in operations a ns, by contestant and quantile of the time."""
    isa = host_isa()
    problem = _int8_problem(layer) if dtype == "int8" else _float_problem(layer, DType(dtype))
    x = problem.x if dtype == "int8" else problem.x.astype(np.float32)
    ours = Ours(*_spec(problem, isa), isa)
    vino = OpenVino(problem.model, "bf16" if dtype == "bf16" else "f32")
    kind, run = next(p for p in peak_kernels(isa).arithmetic if p[0].dtype == ("i8" if dtype == "int8" else dtype))
    buffer = aligned_zeros((4096,))

    def time_peak() -> float:
        start = time.perf_counter_ns()
        run(buffer.ctypes.data, _PEAK_REPEATS, 0)
        return time.perf_counter_ns() - start

    turns: dict[str, tuple[Callable[[], float], int]] = {
        "peak": (time_peak, n_operations(kind, _PEAK_REPEATS)),
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
    return {
        "size": f"{layer}", "dtype": dtype, "isa": isa.name, "machine": host().model, "speeds": speeds,
        "versions": versions(),
    }  # fmt: skip


def _share(r: Record, name: str, quantile: int) -> float:
    return float(r["speeds"][name][str(quantile)] / r["speeds"]["peak"][str(quantile)])


def _row(r: Record) -> str:
    speeds = [f"{r['speeds'][name][str(QUANTILES[0])]:.0f}" for name in ("peak", "vivace", "openvino")]
    shares = [f"{_share(r, name, q):.0%}" for q in QUANTILES for name in ("vivace", "openvino")]
    return f"| {' | '.join([r['size'], r['dtype'], *speeds, *shares])} |"


def markdown(records: Sequence[Record]) -> str:
    """The table."""
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
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *map(_row, records),
        "",
        LIMIT,
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
