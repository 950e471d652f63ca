"""Formats by layer: what is decided from given measurements, the metrics, and engines that it makes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from tests.lower.harness import build

import vivace
from vivace.base.dtypes import DType
from vivace.base.errors import InputError
from vivace.base.knobs import knobs
from vivace.formats import MOST_LAYERS, Decision, Engines, decide, drop, regions
from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Type, Value
from vivace.lower.precision import narrow, products

F32 = DType.f32


@dataclass
class Fake:
    """Errors add up in power; a layer takes its narrow time where it is narrow, and `boundary` more beside f32."""

    f32: dict[str, float]
    narrow: dict[str, float]
    errors: dict[str, float]
    overhead: float = 0.0
    boundary: dict[str, float] = field(default_factory=dict)
    n_errors: int = 0

    def seconds(self, formats: Mapping[str, str]) -> dict[str, float]:
        alone = self.boundary if len(formats) < len(self.f32) else {}
        return {x: self.narrow[x] + alone.get(x, 0.0) if x in formats else t for x, t in self.f32.items()}

    def whole(self, formats: Mapping[str, str]) -> tuple[float, float]:
        return sum(self.f32.values()), sum(self.seconds(formats).values()) + self.overhead

    def error(self, formats: Mapping[str, str]) -> float:
        self.n_errors += 1
        return math.sqrt(sum(self.errors[x] ** 2 for x in formats))


def decided(fake: Fake, max_drop: float) -> Decision:
    return decide(list(fake.f32), ["bf16"], fake, max_drop)


def test_layers_that_save_most_for_their_error_come_first() -> None:
    fake = Fake({"a": 4, "b": 4, "c": 4}, {"a": 1, "b": 3, "c": 1}, {"a": 3e-3, "b": 3e-3, "c": 4e-3})
    assert decided(fake, 1).formats == dict.fromkeys("abc", "bf16")
    some = decided(fake, 5e-3)
    assert some.formats == {"a": "bf16", "c": "bf16"} and some.error == pytest.approx(5e-3)
    assert [x.saved_ms for x in some.layers] == [3000, 0, 3000] and "error" in some.layers[1].reason
    assert decided(fake, 3.5e-3).formats == {"a": "bf16"}
    assert decided(fake, 1e-3).formats == {} and decided(fake, 1e-3).error == 0
    assert [x.error for x in decided(fake, 1e-3).layers] == [3e-3, 3e-3, 4e-3]


def test_what_is_not_faster_is_undone() -> None:
    fake = Fake({"a": 4, "b": 4, "c": 4}, {"a": 1, "b": 4, "c": 2}, {"a": 1e-3, "b": 0, "c": 1e-3})
    assert decided(fake, 1).formats == {"a": "bf16", "c": "bf16"}
    fake.boundary = {"c": 2.5}  # its casts take what it saves, once its neighbour is f32
    found = decided(fake, 1)
    assert found.formats == {"a": "bf16"} and found.layers[2].reason == "no faster than f32"
    fake.overhead = 3.5
    assert decided(fake, 1).formats == {} and decided(fake, 1).ms == decided(fake, 1).f32_ms


def test_errors_are_measured_a_logarithm_of_times() -> None:
    names = [f"l{i}" for i in range(32)]
    fake = Fake(dict.fromkeys(names, 2.0), dict.fromkeys(names, 1.0), dict.fromkeys(names, 1e-3))
    found = decided(fake, 4.1e-3)
    assert len(found.formats) == 16 and list(found.formats) == names[:16] and found.error <= 4.1e-3
    assert fake.n_errors <= 32 + 8


def test_metrics() -> None:
    want = {"y": np.array([[3.0, 4.0], [0.0, 1.0]], np.float32), "n": np.array([1])}
    got = {"y": np.array([[4.0, 3.0], [0.0, 1.0]], np.float32), "n": np.array([2])}
    assert drop("max_absolute", got, want) == 1 and drop("top1", got, want) == 0.5
    assert drop("relative", got, want) == pytest.approx(math.sqrt(2 / 26))
    assert drop("cosine", got, want) == pytest.approx(1 - 24 / 25)
    assert (
        all(drop(m, want, want) == 0 for m in ("relative", "max_absolute", "top1"))
        and drop("cosine", want, want) < 1e-12
    )
    assert drop("relative", {"y": np.array([np.nan])}, {"y": np.array([1.0])}) == math.inf
    assert drop("relative", {"y": np.array([np.nan, 1])}, {"y": np.array([np.nan, 1])}) == 0


def test_many_products_are_cut_into_runs() -> None:
    b = Builder()
    values = [b.input(f"x{i}", Type(F32, (1,))) for i in range(100)]
    found = regions([([f"n{i}"], v) for i, v in enumerate(values)], MOST_LAYERS)
    assert len(found) <= MOST_LAYERS and [v for r in found.values() for v in r.values] == values
    assert next(iter(found)) == "n0 .. n3"


def chain(b: Builder, x: Value) -> Value:
    for i in range(4):
        w = np.random.default_rng(i).standard_normal((96, 96)).astype(np.float32) / 10
        x = b.relu(b.matmul(x, b.const(w)))
    return b.matmul(x, b.const(np.ones((96, 4), np.float32)))


def graph_of_chain() -> Graph:
    return build(chain, Type(F32, (64, 96)))


def test_only_some_products_multiply_halves() -> None:
    graph = graph_of_chain()
    some = [n.outputs[0] for n in products(graph)][1:3]
    found = narrow(graph, DType.bf16, some)
    # Both read halves, and what follows the second up to the next product is read in f32.
    assert found.n_products == 2 and found.n_values == 2
    assert narrow(graph, DType.bf16, []).n_values == 0
    everything = [n.outputs[0] for n in products(graph)]
    assert narrow(graph, DType.bf16, everything).n_products == narrow(graph).n_products


@pytest.mark.parametrize("with_samples", [False, True])
def test_engine(with_samples: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The times are made up, errors are measured: all layers but the second are faster in bf16, none in f16."""

    def seconds(engines: Engines, formats: Mapping[str, str]) -> dict[str, float]:
        slow = engines.layers[1]
        return {x: 0.5 if formats.get(x) == "bf16" and x != slow else 1.0 for x in engines.layers}

    monkeypatch.setattr(Engines, "seconds", seconds)
    monkeypatch.setattr(Engines, "whole", lambda engines, formats: (5.0, 3.0))
    graph = graph_of_chain()
    x = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)
    samples = {graph.inputs[0].name: x}
    given: Any = {"calibration": samples} if with_samples else {}
    with knobs.scope(emulate=True):
        engine = vivace.compile(graph, precision="auto", max_drop=0.02, threads=1, **given)
        f32 = vivace.compile(graph, threads=1)
    stats = engine.stats
    layers = cast(list[dict[str, Any]], stats["layers"])
    assert stats["precision"] == "auto" and stats["max_drop"] == 0.02 and stats["metric"] == "relative"
    assert [x["format"] for x in layers] == ["bf16", "f32", "bf16", "bf16", "bf16"]
    assert [x["saved_ms"] for x in layers] == [500, 0, 500, 500, 500] and layers[1]["reason"] == "no faster than f32"
    assert all(0 < x["error"] <= 0.02 for i, x in enumerate(layers) if i != 1)
    assert (stats["f32_ms"], stats["auto_ms"]) == (5000, 3000)
    assert ("given" if with_samples else "seeded") in str(stats["measured_on"])
    assert 0 < cast(float, stats["error"]) <= 0.02
    assert 0 < drop("relative", engine.run(samples), f32.run(samples)) <= 0.02
    engine.save(tmp_path / "m.vivace")
    assert vivace.load(tmp_path / "m.vivace").stats["layers"] == layers


def test_bytes_that_are_slower_than_f32_are_undone() -> None:
    fake = Fake({"a": 4, "b": 4, "c": 4}, {"a": 1, "b": 1, "c": 5}, dict.fromkeys("abc", 0.0))
    found = decide(["a", "b", "c"], ["bf16"], fake, 1.0, {"b", "c"})
    assert found.formats == {"a": "bf16", "b": "f32"} and [x.format for x in found.layers] == ["bf16", "f32", "i8"]
    assert found.layers[2].reason == "no faster than i8"


def test_engine_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The times are made up: the first product of bytes is faster in f32, where its results are the same."""

    def seconds(engines: Engines, formats: Mapping[str, str]) -> dict[str, float]:
        return {x: 0.5 if formats.get(x) == "f32" and x == engines.layers[0] else 1.0 for x in engines.layers}

    monkeypatch.setattr(Engines, "seconds", seconds)
    monkeypatch.setattr(Engines, "whole", lambda engines, formats: (5.0, 3.0))

    def products_of_bytes(b: Builder, q: Value) -> Value:
        for i in range(2):
            w = b.const(np.random.default_rng(i).integers(-128, 128, (24 + 8 * i, 32)).astype(np.int8))
            total = b.cast(b.matmul_integer(q, w, b.const(np.uint8(3))), to=F32)
            q = b.quantize(b.mul(total, b.const(np.float32(0.01))), b.const(np.float32(1)), b.const(np.uint8(3)))
        return q

    graph = build(products_of_bytes, Type(DType.u8, (5, 24)))
    auto, plain = (vivace.compile(graph, threads=1, **given) for given in ({"precision": "auto", "max_drop": 0.0}, {}))
    layers = cast(list[dict[str, Any]], auto.stats["layers"])
    assert [x["format"] for x in layers] == ["f32", "i8"] and layers[1]["reason"] == "no faster than i8"
    feeds = {graph.inputs[0].name: np.random.default_rng(0).integers(0, 256, (5, 24)).astype(np.uint8)}
    for name, want in plain.run(feeds).items():
        np.testing.assert_array_equal(auto.run(feeds)[name], want)


def test_a_tolerance_is_asked_for() -> None:
    with pytest.raises(InputError, match="tolerance"):
        vivace.compile(graph_of_chain(), precision="auto")
    with pytest.raises(InputError, match="unknown metric"):
        vivace.compile(graph_of_chain(), precision="auto", max_drop=0.1, metric="bleu")


def test_f32_where_nothing_multiplies_halves() -> None:
    engine = vivace.compile(graph_of_chain(), precision="auto", max_drop=0.1, target="sse", threads=1)
    assert engine.stats["precision"] == "f32" and "sse has no products" in str(engine.stats["precision_note"])
