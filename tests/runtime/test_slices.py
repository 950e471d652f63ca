"""A large batch is computed a few rows at a time, with the same results, where each row stands for itself."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto
from tests import races
from tests.onnx.making import model, node, value

import vivace
from vivace.base.dims import symbol
from vivace.base.errors import InputError
from vivace.base.machine import host
from vivace.graph.batch import rows_of, why_not_by_rows
from vivace.graph.reference import evaluate
from vivace.lower import image
from vivace.lower.image import Batch
from vivace.onnx.importer import import_model
from vivace.runtime.engine import Engine
from vivace.runtime.slices import AT_ONCE, slices_of

Array = np.ndarray


def weight(*shape: int, seed: int = 0) -> Array:
    return (np.random.default_rng(seed).standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def images() -> ModelProto:
    """Two convolutions, a residual, a pool, and a product; 65 KB of values an image."""
    nodes = [
        node("Conv", "x w0", "a", pads=[1, 1, 1, 1]), node("Relu", "a", "b"),
        node("Conv", "b w1", "c", pads=[1, 1, 1, 1]), node("Add", "b c", "d"),
        node("GlobalAveragePool", "d", "e"), node("Flatten", "e", "f", axis=1), node("MatMul", "f w2", "y"),
    ]  # fmt: skip
    weights = {"w0": weight(16, 3, 3, 3), "w1": weight(16, 16, 3, 3), "w2": weight(16, 5)}
    return model(nodes, [value("x", ["n", 3, 16, 16])], [value("y", ["n", 5])], weights)


CONSTANTS = {
    "w": weight(6, 6), "row": weight(6), "last": np.array([2]), "first": np.array([0]), "merge": np.array([-1, 12]),
    "two": np.array([0, 1]), "k": np.array([2]), "wide": np.array([1, 4, 6]), "0": np.array([0]), "1": np.array([1]),
    "2": np.array([2]), "pads": np.array([1, 0, 0, 0, 0, 0]),
}  # fmt: skip


def one_op(op: str, ins: str = "x", rank: int = 3, **attrs: object) -> ModelProto:
    shape = ["n", 4, 6][:rank]
    used = {k: v for k, v in CONSTANTS.items() if k in ins.split()}
    nodes = [node("Transpose", "x", "x4", perm=[0, 2, 1])] if "x4" in ins else []
    results = "y z" if op == "TopK" else "y"
    return model([*nodes, node(op, ins, results, **attrs)], [value("x", shape)], [value("y", None)], used)


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if caches were so small that the values of two images fit."""
    alone = vivace.compile(images(), threads=1, disable=("slices",))
    assert isinstance(alone, Engine)
    bytes_of = alone.memory({"x": (1, 3, 16, 16)})["arena_bytes"]
    monkeypatch.setattr(image, "NEAR_CACHES", 2.5 * bytes_of / host().cache_bytes(2))


def plain(x: Array) -> Array:
    return vivace.compile(images(), threads=1, disable=("slices",)).run({"x": x})["y"]


@pytest.mark.usefixtures("near")
@pytest.mark.parametrize("threads", [1, 2])
def test_batches_of_any_size(threads: int) -> None:
    engine = vivace.compile(images(), threads=threads)
    assert isinstance(engine, Engine)
    for n in (16, 1, 7, 2, 31, 0, 16):
        x = weight(n, 3, 16, 16, seed=n)
        want = plain(x)
        np.testing.assert_allclose(engine.run({"x": x})["y"], want, rtol=1e-5, atol=1e-5)
        out = np.empty((n, 5), np.float32)
        assert engine.run({"x": x}, outputs={"y": out})["y"] is out
        np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
    two, many = (engine.memory({"x": (n, 3, 16, 16)})["arena_bytes"] for n in (2, 31))
    assert many == threads * two  # each thread has an arena of a slice


@pytest.mark.usefixtures("near")
def test_a_batch_of_fixed_size_is_compiled_for_a_slice(tmp_path: Path) -> None:
    shape = (14, 3, 16, 16)
    engine = vivace.compile(images(), threads=1, shapes={"x": shape})
    assert isinstance(engine, Engine)
    assert engine.image.inputs[0].shape == (2, *shape[1:])
    assert engine.inputs[0].shape == shape
    assert engine.outputs[0].shape == (14, 5)
    x = weight(*shape)
    np.testing.assert_allclose(engine.run({"x": x})["y"], plain(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="axis 0 is 2"):
        engine.run({"x": x[:2]})
    engine.save(tmp_path / "m.vivace")
    again = vivace.load(tmp_path / "m.vivace", threads=1)
    assert again.inputs[0].shape == shape
    np.testing.assert_array_equal(again.run({"x": x})["y"], engine.run({"x": x})["y"])


@pytest.mark.usefixtures("near")
def test_a_graph_of_fixed_sizes_is_taken_as_it_is() -> None:
    shape = (14, 3, 16, 16)
    engine = vivace.compile(import_model(images(), overrides={"x": shape}), threads=1, shapes={"x": shape})
    assert isinstance(engine, Engine)
    assert engine.image.batch is None
    x = weight(*shape)
    np.testing.assert_allclose(engine.run({"x": x})["y"], plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("near")
def test_a_profile_counts_every_slice() -> None:
    x = weight(8, 3, 16, 16)
    sliced, whole = (vivace.compile(images(), threads=1, disable=names) for names in ((), ("slices",)))
    assert isinstance(sliced, Engine)
    assert isinstance(whole, Engine)
    two = Engine(sliced.image, 2)
    alone, beside, expected = (
        {(e.kernel, e.flops) for e in engine.profile({"x": x})} for engine in (sliced, two, whole)
    )
    assert alone == beside
    assert sum(flops for _, flops in alone) == sum(flops for _, flops in expected)
    steps = len(whole.traces({"x": x[:2]})[0])
    for engine in (sliced, two):
        assert len(engine.traces({"x": x})[0]) == 4 * steps


@pytest.mark.parametrize("n_threads", [1, 2, 3, 5])
@pytest.mark.parametrize("row_bytes", [1, 2, 7, 30])
def test_slices_cover_a_batch_and_give_threads_equal_shares(n_threads: int, row_bytes: int) -> None:
    """Memory for 20 bytes is near: at most that is alive in a thread, unless one row takes more."""
    most = max(1, 20 // row_bytes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image, "NEAR_CACHES", 20 / host().cache_bytes(2))
        for total in (0, 1, 2, 3, 4, 5, 12, 31, 400):
            shapes = [(total, 4), (3 * total,)]
            found = slices_of(
                Batch(symbol("n")), {"n": total}, partial(list, shapes), lambda d: d["n"] * row_bytes, n_threads
            )
            rows = [s.dims.values["n"] for s in found]
            assert (found == []) == (total <= most)
            assert sum(s.n * n for s, n in zip(found, rows)) == (total if found else 0)
            assert max(rows, default=0) <= most
            at = 0
            for s, n in zip(found, rows):
                assert s.rows == (slice(at, at + s.n * n), slice(3 * at, 3 * (at + s.n * n)))
                assert s.n == 1 or (s.n % n_threads == 0 and s.n <= AT_ONCE * n_threads and n * row_bytes <= 20)
                at += s.n * n
            shared = sum(n for s, n in zip(found, rows) if s.n == 1)
            if n_threads > 1 and row_bytes <= 20 and total > most and total >= n_threads:
                assert shared < n_threads * (rows[0] + 1)


@pytest.mark.usefixtures("near")
def test_slices_side_by_side_give_the_results_of_one_thread() -> None:
    """Bit by bit, with more threads than cores, in every order, and beside another run, which leaves them fewer."""
    with races.sharing_all():
        engine = vivace.compile(images(), threads=1)
    assert isinstance(engine, Engine)
    for n in (3, 8, 11):
        races.check(engine.image, {"x": weight(n, 3, 16, 16, seed=n)}, threads=(2, 4))
    x, two = weight(23, 3, 16, 16), Engine(engine.image, 2)
    want, found = engine.run({"x": x})["y"], [two.run({"x": x})["y"]]
    callers = [
        threading.Thread(target=lambda: found.extend(two.run({"x": x})["y"] for _ in range(20))) for _ in range(3)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 61
    for y in found:
        np.testing.assert_array_equal(y, want)


def test_small_batches_and_small_models_are_computed_at_once() -> None:
    engine = vivace.compile(images(), threads=1)
    assert isinstance(engine, Engine)
    few, more = (engine.memory({"x": (n, 3, 16, 16)})["arena_bytes"] for n in (4, 8))
    assert more == 2 * few


BY_ROWS = [
    one_op("Relu"), one_op("Add", "x row"), one_op("Softmax", axis=-1), one_op("Softmax", axis=1),
    one_op("MatMul", "x w"), one_op("MatMul", "x x4"), one_op("Transpose", perm=[0, 2, 1]),
    one_op("ReduceSum", "x last"),
    one_op("LayerNormalization", "x row", axis=-1), one_op("Concat", "x x", axis=1), one_op("Reshape", "x merge"),
    one_op("Gather", "x two", axis=1), one_op("TopK", "x k", axis=-1), one_op("Expand", "x wide"),
    one_op("Slice", "x 0 2 1"),
]  # fmt: skip
MIXED = [
    one_op("Softmax", axis=0), one_op("Transpose", perm=[1, 0, 2]), one_op("ReduceMax", "x first"),
    one_op("Concat", "x x", axis=0), one_op("CumSum", "x 0"), one_op("Gather", "x two", axis=0), one_op("Shape"),
    one_op("Slice", "x 0 2 0"), one_op("Pad", "x pads"), one_op("ReduceMean"), one_op("Flatten", axis=0),
    one_op("Gemm", "x x", rank=2, transB=1), one_op("NonZero"),
]  # fmt: skip


@pytest.mark.parametrize("source", BY_ROWS, ids=lambda m: m.graph.node[0].op_type)
def test_rows_that_stand_for_themselves(source: ModelProto) -> None:
    g = import_model(source)
    rows = rows_of(g)
    assert rows is not None
    assert why_not_by_rows(g, rows.name) == ""
    x = weight(5, *[d.dim_value for d in source.graph.input[0].type.tensor_type.shape.dim[1:]])
    whole = evaluate(g, {"x": x})
    parts = [evaluate(g, {"x": x[a:b]}) for a, b in ((0, 2), (2, 5))]
    for i, array in enumerate(whole):
        np.testing.assert_allclose(np.concatenate([p[i] for p in parts]), array, rtol=1e-6)


@pytest.mark.parametrize("source", MIXED, ids=lambda m: m.graph.node[0].op_type)
def test_rows_that_are_mixed(source: ModelProto) -> None:
    g = import_model(source)
    rows = rows_of(g)
    assert rows is not None
    assert why_not_by_rows(g, rows.name)
