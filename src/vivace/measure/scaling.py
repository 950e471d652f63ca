"""What more cores would bring, on paper: the steps of a model shared out among 4 to 128 threads as the team does it.

    stages = stages_of(engine, inputs)          # timed on one thread here
    costs = hand_over_costs()                   # timed on two threads here
    for row in predict(stages, (4, 16, 64), costs): print(row.speed_up)

A stage is what stands between two hand-overs: a serial step, or the steps that share one. Its pieces (grains) and their
times are those of the engine's program; who takes which is simulated claim by claim (`vivace.targets.cpu.threads`):

    publish      the leader makes the stage known; others see it `see_ns` later
    claim        takes a part of the remaining pieces; one after another, each `claim_ns`, since all write one word
    settle       every thread that worked counts down another word, `claim_ns` each; the last one leads on

Rules:
* EQUAL: the pieces of a step take equally long, as long as they did on one thread.
* WARM: threads are awake, which they are within `SPIN_NS` of their last piece.

Not handled: slices of a large batch, which threads compute side by side (`vivace.runtime.crew`); they are simulated as
if all threads shared each of their steps. Nor, so that the prediction is a bound from above: caches and memory shared
by more threads (weights of large layers then come from farther away), clocks that fall with more busy cores,
hyper-threads, several nodes of memory.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from vivace.base.dims import evaluate
from vivace.base.machine import isa
from vivace.runtime.engine import Engine
from vivace.runtime.executable import Executable
from vivace.runtime.sharing import Sharing
from vivace.targets.cpu import jit
from vivace.targets.cpu.steps import Kernel, Value
from vivace.targets.cpu.threads import claim_divisor

_N_RUNS, _RUNS_NS = 15, 1e9  # runs that are timed, fewer where they would take longer than this together


@dataclass(frozen=True, slots=True)
class Piece:
    """One step of a stage: `n_grains` that may run side by side, each taking `grain_ns`."""

    line: int
    n_grains: int
    grain_ns: float


@dataclass(frozen=True, slots=True)
class Stage:
    """What stands between two hand-overs. A serial one runs on one thread, whoever leads."""

    pieces: tuple[Piece, ...]
    is_serial: bool

    @property
    def work_ns(self) -> float:
        return sum(p.n_grains * p.grain_ns for p in self.pieces)

    @property
    def n_grains(self) -> int:
        return sum(p.n_grains for p in self.pieces)


@dataclass(frozen=True, slots=True)
class Costs:
    """What handing work over takes, in ns."""

    see_ns: float
    claim_ns: float
    step_ns: float  # of a step that nobody shares


@dataclass(frozen=True, slots=True)
class Prediction:
    """One thread count. Shares are of the time of all threads; the rest of it is work.

    `unshared`: threads that have no piece to take, because a stage is serial, has fewer pieces than threads, or ends
    unevenly. `handing_over`: publishing, claiming, waiting for the last one.
    """

    threads: int
    seconds: float
    speed_up: float
    efficiency: float
    unshared: float
    handing_over: float


@dataclass(frozen=True, slots=True)
class Scaling:
    """A model's stages in numbers, and the prediction for each thread count."""

    n_stages: int
    n_serial: int
    n_barriers: int
    serial_share: float
    least_grains: tuple[tuple[int, float], ...]  # (threads, share of the work in stages with fewer pieces than that)
    stays_on_one: bool
    costs: Costs
    predictions: tuple[Prediction, ...]


def examine(engine: Engine, inputs: Mapping[str, np.ndarray], threads: Sequence[int]) -> Scaling:
    """Times an engine of one thread on these inputs, and predicts."""
    stages, costs = stages_of(engine, inputs), hand_over_costs()
    work = sum(s.work_ns for s in stages) or 1.0
    shared = [s for s in stages if not s.is_serial and s.n_grains > 1]
    sharing = Sharing(engine.image.lines, engine.image.kernels)
    few = tuple((n, sum(s.work_ns for s in shared if s.n_grains < n) / work) for n in threads)
    return Scaling(
        n_stages=len(stages),
        n_serial=sum(s.is_serial for s in stages),
        n_barriers=len(shared),
        serial_share=1 - sum(s.work_ns for s in shared) / work,
        least_grains=few,
        stays_on_one=sharing.threads(engine.dims_of(inputs), max(threads, default=1)) == 1,
        costs=costs,
        predictions=tuple(predict(stages, threads, costs)),
    )


def stages_of(engine: Engine, inputs: Mapping[str, np.ndarray], n_runs: int = _N_RUNS) -> list[Stage]:
    """The stages of one inference in the order in which they ran, loops unrolled; times are medians of some runs."""
    once_ns = sum(chunk.duration_ns for chunk in engine.traces(inputs)[0])
    runs = engine.traces(inputs, min(n_runs, max(3, round(_RUNS_NS / max(once_ns, 1)))))
    lines, kernels = engine.image.lines, engine.image.kernels
    dims = engine.dims_of(inputs)
    stages: list[list[Piece]] = []
    kinds: list[bool] = []
    for at, chunk in enumerate(runs[0]):
        line = lines[chunk.step]
        kernel = kernels[line.kernel]
        units = chunk.end - chunk.begin
        n_grains = max(1, -(-units // max(1, evaluate(kernel.grain, dims)))) if not line.serial else 1
        ns = median(run[at].duration_ns for run in runs if len(run) == len(runs[0]))
        piece = Piece(chunk.step, n_grains, ns / n_grains)
        follows = bool(stages) and not kinds[-1] and stages[-1][-1].line == chunk.step - 1
        if line.beside and not line.serial and follows:
            stages[-1].append(piece)
        else:
            stages.append([piece])
            kinds.append(line.serial)
    return [Stage(tuple(pieces), is_serial) for pieces, is_serial in zip(stages, kinds, strict=True)]


def predict(stages: Sequence[Stage], threads: Sequence[int], costs: Costs) -> Iterator[Prediction]:
    """The simulated time at each thread count, against the simulated time on one thread."""
    work = sum(s.work_ns for s in stages)
    alone = simulate(stages, 1, costs)
    free = Costs(0.0, 0.0, 0.0)
    for n in threads:
        taken, ideal = simulate(stages, n, costs), simulate(stages, n, free)
        yield Prediction(
            n,
            taken / 1e9,
            alone / taken if taken else 1.0,
            alone / taken / n if taken else 1.0,
            (ideal - work / n) / taken if taken else 0.0,
            (taken - ideal) / taken if taken else 0.0,
        )


def simulate(stages: Sequence[Stage], n_threads: int, costs: Costs) -> float:
    """Nanoseconds of one inference."""
    now = 0.0
    for stage in stages:
        if stage.is_serial or n_threads < 2 or stage.n_grains < 2:
            now += stage.work_ns + costs.step_ns * len(stage.pieces)
        else:
            now = _shared(stage, n_threads, costs, now)
    return now


def _shared(stage: Stage, n_threads: int, costs: Costs, now: float) -> float:
    """When the last piece of a stage that begins now is done."""
    edges = np.cumsum([0, *(p.n_grains for p in stage.pieces)])
    until = np.cumsum([0.0, *(p.n_grains * p.grain_ns for p in stage.pieces)])

    def work_before(grain: int) -> float:
        k = int(np.searchsorted(edges, grain, "right")) - 1
        return (
            float(until[-1])
            if k >= len(stage.pieces)
            else float(until[k] + (grain - edges[k]) * stage.pieces[k].grain_ns)
        )

    remaining, total = stage.n_grains, stage.n_grains
    ready = [(now + costs.step_ns + (costs.see_ns if i else 0.0), i) for i in range(n_threads)]
    heapq.heapify(ready)
    word_free = now
    ends: list[float] = []
    worked: set[int] = set()
    while ready:
        at, i = heapq.heappop(ready)
        if not remaining:
            if i in worked:
                ends.append(at)
            continue
        start = max(at, word_free)
        word_free = start + costs.claim_ns
        chunk = max(1, remaining // claim_divisor(total, n_threads))
        begin = total - remaining
        remaining -= chunk
        worked.add(i)
        heapq.heappush(ready, (word_free + work_before(begin + chunk) - work_before(begin), i))
    done = 0.0
    for end in sorted(ends):
        done = max(done, end) + costs.claim_ns
    return done


# args: cycles; stands still for so long per unit
_WAIT = """
declare i64 @llvm.readcyclecounter()
define void @wait(ptr %args, i64 %begin, i64 %end, ptr %scratch) {
entry:
  %cycles = load i64, ptr %args
  %n = sub i64 %end, %begin
  %least = mul i64 %n, %cycles
  %t0 = call i64 @llvm.readcyclecounter()
  br label %look
look:
  %t1 = call i64 @llvm.readcyclecounter()
  %passed = sub i64 %t1, %t0
  %more = icmp ult i64 %passed, %least
  br i1 %more, label %look, label %done
done:
  ret void
}
"""
_N_STEPS, _MANY, _CYCLES = 200, 64, 5000


def hand_over_costs() -> Costs:
    """Measured with steps that only wait: what many empty pieces take more than two is claims; what two pieces of some
    us take more than one of them, and claims do not explain, is seeing and being seen.
    """
    library = jit.load([jit.compile_text(_WAIT, isa("sse"))])

    def step_ns(n_threads: int, units: int, cycles: int) -> float:
        step = Kernel(library.address("wait"), (Value(cycles),), units)
        context = Executable([step] * _N_STEPS, n_threads=n_threads, keep=library).context()
        times = []
        for _ in range(30):
            start = time.perf_counter_ns()
            context.run([], [])
            times.append(time.perf_counter_ns() - start)
        return median(times) / _N_STEPS

    alone = step_ns(1, 2, 0)
    claim = (step_ns(2, _MANY, 0) - step_ns(2, 2, 0)) / (_n_claims(_MANY, 2) - _n_claims(2, 2))
    piece = Stage((Piece(0, 2, step_ns(1, 2, _CYCLES) / 2),), is_serial=False)
    costs = Costs(0.0, max(0.0, claim), alone)
    see = step_ns(2, 2, _CYCLES) - simulate([piece], 2, costs)
    return replace(costs, see_ns=max(0.0, see))


def _n_claims(n_grains: int, n_threads: int) -> int:
    n, divisor = 0, claim_divisor(n_grains, n_threads)
    while n_grains:
        n_grains -= max(1, n_grains // divisor)
        n += 1
    return n
