"""Random models of any operators, compiled in any way that users have, against ONNX Runtime.

    python -m tests.networks.wide 0 1000      seeds 0 to 999, each with a time limit, a line each

Where `cases` looks closely at how kernels are joined, this looks at everything around them: control flow, sizes that
only show at run time, narrow weights, caches, formats by layer, tuning, measured providers, saved engines, several
callers at once, checked and shuffled runs, the model that `vivace optimize` writes.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import onnx
import onnxruntime
from onnx import ModelProto
from tests import races
from tests.networks import cases
from tests.networks.cases import bits, compare, meaning
from tests.networks.maker import Array, Maker
from tests.networks.models import make
from tests.networks.ways import TARGETS, quantized

import vivace
from vivace.base.knobs import knobs
from vivace.base.machine import isa as named
from vivace.graph.graph import Graph
from vivace.onnx.importer import import_model
from vivace.optimizer import optimize_model
from vivace.targets.cpu.amx import missing_here

FORMATS = ("f32", "f32", "f32", "f32", "bf16", "f16", "auto", "int8")
DISABLED = ("winograd", "slices", "epilogues", "placement", "strips", "row_blocks", "in_place", "trees")
Feed = dict[str, Array]


def session(model: ModelProto) -> Callable[[Feed], list[Array]]:
    """The model in ONNX Runtime, as it is written."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    made = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return lambda feed: made.run(None, feed)


def options_of(random: Random, precision: str) -> dict[str, object]:
    """Arguments of `vivace.compile`."""
    targets = [t for t in TARGETS if t == "host" or not missing_here(named(t).flags)]
    made: dict[str, object] = {
        "threads": random.choice((1, 2, 3)), "target": random.choice(targets),
        "level": random.choice((0, 1, 2, 3, 99, 99, 99, 99)), "cache": False,
        "disable": tuple(x for x in DISABLED if random.random() < 0.1),
    }  # fmt: skip
    if precision == "auto":
        made |= {"precision": "auto", "max_drop": 0.2}
    elif precision in ("bf16", "f16"):
        made["precision"] = precision
    if precision != "auto":
        if random.random() < 0.1:
            made |= {"tune": "fast", "tune_budget": 0.5}
        elif random.random() < 0.04 and precision == "f32":
            made["providers"] = "auto"
    return made


def check(seed: int) -> str:
    """Raises: AssertionError, or whatever a compile or a run raises. Returns what was tried, or why not."""
    random = Random(seed)
    model, m = make(random, is_wide=True)
    precision = random.choice(FORMATS)
    if precision == "int8":
        made = quantized(model, m, random)
        if made is None:
            return "not quantized"
        model = made
    options = options_of(random, precision)
    runs, n_told = known_runs(model, m, precision)
    if not runs:
        return "no run of it is known"
    shapes = {name: x.shape for name, x in runs[0][0].items()} if random.random() < 0.2 else None
    runs = runs[:1] if shapes else runs
    told = [f"{len(m.nodes)} nodes", precision, *(f"{k}={v}" for k, v in options.items() if k != "cache" and v)]
    if precision == "auto":
        options["calibration"] = runs[0][0]
    is_checked, is_shuffled = (random.random() < 0.15 for _ in range(2))
    with knobs.scope(emulate=True, check=is_checked, shuffle=is_shuffled), races.sharing_all():
        engine = vivace.compile(model, shapes=shapes, **options)  # type: ignore[arg-type]
        told += [type(engine).__name__, f"{len(runs)} sizes, {n_told} by ONNX Runtime"]
        results = [engine.run(feed) for feed, _ in runs]
        for (feed, want), got in zip(runs, results, strict=True):
            share = 2.0 if precision == "auto" else 1.0
            compare(got, want, "bf16" if precision == "auto" else precision, share, where(precision, feed))
        if random.random() < 0.4:
            at_once(engine, runs, results)
            told.append("at once")
        if random.random() < 0.4:
            saved(engine, runs, results)
            told.append("saved")
    if precision == "f32" and random.random() < 0.3 and not shapes:
        rewritten(model, runs, options)
        told.append("rewritten")
    return ", ".join(told)


def known_runs(model: ModelProto, m: Maker, precision: str) -> tuple[list[tuple[Feed, list[Array]]], int]:
    """Inputs with the outputs that the model means; how many of those are ONNX Runtime's too. What is left to another
    provider has no meaning of ours.
    """
    graph, runs, n_told = import_model(model), [], 0
    try:
        peer = session(model)
    except Exception:
        peer = None
    for sizes in m.sizes:
        feed = m.feed(sizes)
        want: list[Array] = []
        try:
            want = meaning(graph, feed) if is_ours(graph) else []
        except Exception:
            if all(sizes.values()):
                raise
            continue
        if peer is not None and precision != "int8" and all(x.size for x in feed.values()):  # it may crash on none
            theirs = peer(feed)
            n_told += 1
            if is_ours(graph):
                same(want, theirs, f"{where('f32', feed)}: what is imported")
            want = want or theirs
        if want:
            runs.append((feed, want))
    return runs, n_told


def is_ours(graph: Graph) -> bool:
    """Whether nothing is left to another provider, whose operators have no meaning here."""
    return all(n.op.name != "onnx" for n in graph.walk())


def where(precision: str, feed: Mapping[str, Array]) -> str:
    return f"{precision} { {name: x.shape for name, x in feed.items()} }"


def at_once(engine: vivace.Engine, runs: list[tuple[Feed, list[Array]]], results: list[dict[str, Array]]) -> None:
    """Several callers of one engine get what one gets."""

    def call(k: int) -> None:
        for i in range(4):
            j = (k + i) % len(runs)
            bits(engine.run(runs[j][0]), results[j], f"{where('', runs[j][0])}, among others")

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(call, range(3)))


def saved(engine: vivace.Engine, runs: list[tuple[Feed, list[Array]]], results: list[dict[str, Array]]) -> None:
    """What is loaded gives what was saved."""
    with tempfile.TemporaryDirectory() as folder:
        engine.save(Path(folder) / "m.vivace")
        again = vivace.load(Path(folder) / "m.vivace", threads=engine.threads)
        for (feed, _), result in zip(runs, results, strict=True):
            bits(again.run(feed), result, f"{where('', feed)}, loaded")


def rewritten(model: ModelProto, runs: list[tuple[Feed, list[Array]]], options: Mapping[str, object]) -> None:
    """What `vivace optimize` writes means the same, to ONNX Runtime too."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "m.onnx", Path(folder) / "n.onnx"
        source.write_bytes(model.SerializeToString())
        optimize_model(source, target, level=options["level"])  # type: ignore[arg-type]
        made = onnx.load(target)
    peer, graph = session(made), import_model(made)
    for feed, want in runs:
        if all(x.size for x in feed.values()):
            same(peer(feed), want, f"{where('', feed)}, optimized")
        if is_ours(graph):
            same(meaning(graph, feed), want, f"{where('', feed)}, optimized and read again")


def same(got: list[Array], want: list[Array], where: str) -> None:
    compare({str(i): y for i, y in enumerate(got)}, want, "f32", 1.0, where)


if __name__ == "__main__":
    cases.main(int(sys.argv[1]), int(sys.argv[2]), check)
