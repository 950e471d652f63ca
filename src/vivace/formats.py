"""`precision="auto"`: which layers compute in a narrow format, by measurement and within a tolerance.

    saved[layer]   time of its kernels in f32, less that in the format with all layers narrow
    error[layer]   error of the outputs against f32 with this layer alone in its format
    kept           layers that save time, those with the least error power for it first, as many as the tolerance allows

Rules:
* MEASURED: a layer that is not faster in a narrow format stays f32. What is kept is measured again as a whole: layers
  that lost by the casts around them are dropped, and all are where the engine is not faster than in f32.
* WITHIN: the error of the engine that is returned was measured on the samples, and is at most `max_drop`.
* BYTES: a product of bytes in a quantized model is a layer of its own, whose other format is f32, with the numbers as
  they were quantized (`lower/rules/floats.py`): where bytes are slower, they are undone. Equal products are one layer,
  however many there are: only errors take an engine each, and few layers of bytes are slower.
* LAYER: a product (or attention) with what follows it up to the next one. A model with more than `MOST_LAYERS` is cut
  into as many runs of neighbours, each of which is decided as one.

The decision is a function of what `Measure` says, so that it is the same for the same measurements.
Not handled: two narrow formats within one layer; branches and loops, which stay f32.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import numpy as np

from vivace.base.errors import InputError

if TYPE_CHECKING:
    from vivace.runtime.engine import Engine
    from vivace.runtime.partitioned import PartitionedEngine

MOST_LAYERS = 32
N_ROUNDS, LEAST_GAIN = 9, 0.02  # a layer must win by more than the noise of a median of 9
F32, BYTES = "f32", "i8"
T = TypeVar("T")
Arrays = Mapping[str, np.ndarray]
Assignment = Mapping[str, str]  # format by layer


def _relative(got: np.ndarray, want: np.ndarray) -> float:
    noise, signal = float(np.sum((got - want) ** 2)), float(np.sum(want**2))
    return 0.0 if noise == 0 else float(np.sqrt(noise / signal)) if signal else np.inf


def _max_absolute(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.max(np.abs(got - want), initial=0.0))


def _top1(got: np.ndarray, want: np.ndarray) -> float:
    if not want.ndim or not want.size:
        return 0.0
    return float(np.mean(got.argmax(axis=-1) != want.argmax(axis=-1)))


def _cosine(got: np.ndarray, want: np.ndarray) -> float:
    if not want.size:
        return 0.0
    x, y = (a.reshape(-1, a.shape[-1] if a.ndim else 1) for a in (got, want))
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return float(np.max(1 - np.where(lengths > 0, (x * y).sum(axis=1) / np.where(lengths > 0, lengths, 1), 1.0)))


# How far outputs are from those in f32; 0 for equal ones.
METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "relative": _relative,  # root of error power over power: 0.01 is a signal-to-noise ratio of 40 dB
    "max_absolute": _max_absolute,
    "top1": _top1,  # share of the rows whose largest element is another one
    "cosine": _cosine,  # 1 - cosine similarity of the row that changed most
}


def drop(metric: str, got: Arrays, want: Arrays) -> float:
    """The worst over the outputs of floats; infinite where NaN or infinity is on one side only."""
    worst = 0.0
    for name, w in want.items():
        if w.dtype.kind not in "fV":
            continue
        a, b = got[name].astype(np.float64), w.astype(np.float64)
        finite = np.isfinite(b)
        if not np.array_equal(finite, np.isfinite(a)):
            return np.inf
        worst = max(worst, METRICS[metric](np.where(finite, a, 0), np.where(finite, b, 0)))
    return worst


@dataclass(frozen=True, slots=True)
class Region(Generic[T]):
    """Neighbouring products that are decided as one: the ONNX nodes they come from, and their results or sites."""

    nodes: tuple[str, ...]
    values: tuple[T, ...]


def regions(products: Sequence[tuple[Sequence[str], T]], most: int) -> dict[str, Region[T]]:
    """At most `most` regions of the products, by name (rule LAYER). Each product has a name at least."""
    size = -(-len(products) // max(most, 1))
    found: dict[str, Region[T]] = {}
    for i in range(0, len(products), max(size, 1)):
        some = products[i : i + size]
        names = [nodes[0] for nodes, _ in some]
        label = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}"
        label = label if label not in found else f"{label} ({i})"
        found[label] = Region(tuple(n for nodes, _ in some for n in nodes), tuple(v for _, v in some))
    return found


class Measure(Protocol):
    """What deciding needs to know of an assignment; layers that it does not name have formats of their own."""

    def seconds(self, formats: Assignment) -> Mapping[str, float]:
        """Time by layer."""
        ...

    def whole(self, formats: Assignment) -> tuple[float, float]:
        """Time of an inference in f32 and with the assignment, taken in turns."""
        ...

    def error(self, formats: Assignment) -> float: ...


@dataclass(frozen=True, slots=True)
class Layer:
    """What became of a layer. `error` is that of its format alone, or of the best one where that was too
    much; `saved_ms` is what its format saves.
    """

    layer: str
    format: str
    error: float
    saved_ms: float
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """The format of each layer, those that are not its own one, and what that comes to."""

    layers: tuple[Layer, ...]
    formats: dict[str, str]
    error: float
    f32_ms: float
    ms: float

    def facts(self) -> dict[str, object]:
        rows = [asdict(x) for x in self.layers]
        return {"layers": rows, "error": self.error, "f32_ms": self.f32_ms, "auto_ms": self.ms}


def decide(
    layers: Sequence[str], formats: Sequence[str], measure: Measure, max_drop: float, integers: Collection[str] = ()
) -> Decision:
    """The formats that save most time within a tolerance. Of `layers` those in `integers` are bytes as they are, and
    may be f32 (rule BYTES); the others are f32, and may be of `formats`.
    """
    own = {x: BYTES if x in integers else F32 for x in layers}
    slower_than_own = {x: f"no faster than {own[x]}" for x in layers}
    exact = measure.seconds({})
    best: dict[str, tuple[str, float]] = {}
    for f in (*formats, *([F32] if integers else [])):
        able = [x for x in layers if (own[x] == BYTES) == (f == F32)]
        if not able:
            continue
        narrow = measure.seconds(dict.fromkeys(able, f))
        for x in able:
            gain = exact[x] - narrow[x]
            if gain > LEAST_GAIN * exact[x] and gain > best.get(x, ("", 0.0))[1]:
                best[x] = (f, gain)
    errors = {x: measure.error({x: f}) for x, (f, _) in best.items()}
    able = [x for x in best if errors[x] <= max_drop]
    able.sort(key=lambda x: (errors[x] ** 2 / best[x][1], layers.index(x)))

    def first(n: int) -> dict[str, str]:
        return {x: best[x][0] for x in able[:n]}

    low, high = 0, len(able) + 1  # `low` fit, `high` do not
    while high - low > 1:
        n = len(able) if high > len(able) else (low + high) // 2
        low, high = (n, high) if measure.error(first(n)) <= max_drop else (low, n)
    kept = first(low)
    why = dict.fromkeys(able[low:], "its error, beside that of the others")
    why |= {x: "its error" for x in best if errors[x] > max_drop}
    gains = {x: gain for x, (_, gain) in best.items()}
    while kept:  # rule MEASURED
        now = measure.seconds(kept)
        gains |= {x: exact[x] - now[x] for x in kept}
        slower = [x for x in kept if now[x] >= exact[x]]
        if not slower:
            break
        why |= {x: slower_than_own[x] for x in slower}
        kept = {x: f for x, f in kept.items() if x not in slower}
    while kept and measure.error(kept) > max_drop:  # rule WITHIN, where errors had cancelled
        last = max(kept, key=able.index)
        why[last] = "its error, beside that of the others"
        del kept[last]
    f32, whole = measure.whole(kept) if kept else (sum(exact.values()), sum(exact.values()))
    if kept and whole >= f32:
        why |= {x: f"the engine was no faster than in {own[x]}" for x in kept}
        kept, whole = {}, f32
    rows = tuple(
        Layer(x, kept.get(x, own[x]), errors.get(x, 0.0), 1e3 * gains[x] if x in kept else 0.0,
              "" if x in kept else why.get(x, slower_than_own[x]))
        for x in layers
    )  # fmt: skip
    return Decision(rows, kept, measure.error(kept) if kept else 0.0, 1e3 * f32, 1e3 * whole)


class Engines:
    """`Measure` by running engines. `make` builds one from an assignment; `layer_of` names the layer of an ONNX node
    that is a product.
    """

    def __init__(
        self, make: Callable[[Assignment], Engine], layers: Sequence[str], layer_of: Mapping[str, str],
        samples: Callable[[Engine], Sequence[Arrays]], metric: str,
    ) -> None:  # fmt: skip
        self.make, self.layers, self.layer_of, self.metric = make, layers, layer_of, metric
        self.f32 = make({})
        self.samples = samples(self.f32)
        if not self.samples:
            raise InputError("no samples", where="calibration", expected="at least one set of inputs")
        self.want = [self.f32.run(s) for s in self.samples]
        self._last: tuple[dict[str, str], Engine] = ({}, self.f32)

    def engine(self, formats: Assignment) -> Engine:
        """The engine of an assignment; the last one is kept."""
        if not formats:
            return self.f32
        if self._last[0] != dict(formats):
            self._last = (dict(formats), self.make(formats))
        return self._last[1]

    def error(self, formats: Assignment) -> float:
        engine = self.engine(formats)
        return max(drop(self.metric, engine.run(s), w) for s, w in zip(self.samples, self.want, strict=True))

    def seconds(self, formats: Assignment) -> dict[str, float]:
        engine, times = self.engine(formats), defaultdict(list)
        for _ in range(N_ROUNDS):
            total = dict.fromkeys(self.layers, 0.0)
            by_line: dict[int, float] = defaultdict(float)
            for event in engine.profile(self.samples[0]):
                by_line[int(event.kernel.partition(":")[0])] += event.duration_ns * 1e-9
            layer = self.layers[0]
            for number, line in enumerate(engine.image.lines):
                layer = next((self.layer_of[n] for n in line.nodes if n in self.layer_of), layer)
                total[layer] += by_line[number]
            for x, t in total.items():
                times[x].append(t)
        return dict(zip(times, map(median, times.values()), strict=True))

    def whole(self, formats: Assignment) -> tuple[float, float]:
        engine, times = self.engine(formats), ([], [])  # type: ignore[var-annotated]
        for _ in range(N_ROUNDS):
            for e, t in zip((self.f32, engine), times, strict=True):
                e.run(self.samples[0])
                start = time.perf_counter()
                e.run(self.samples[0])
                t.append(time.perf_counter() - start)
        return median(times[0]), median(times[1])


def measure_error(
    engine: Engine | PartitionedEngine, f32: Engine | PartitionedEngine, samples: Sequence[Arrays]
) -> list[dict[str, object]]:
    """For each output of floats how far an engine is from another on the worst of some inputs."""
    from vivace.measure.compare import Difference, compare

    worst: dict[str, Difference] = {}
    for sample in samples:
        for d in compare(engine.run(sample), f32.run(sample)):
            if d.name not in worst or d.snr_db < worst[d.name].snr_db:
                worst[d.name] = d
    return [
        {"output": d.name, "snr_db": d.snr_db, "max_absolute": d.max_absolute, "n_special": d.n_special}
        for d in worst.values()
    ]
