"""Caches kept in place: outputs that begin with an input, as views of one array with room for more."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from onnx import ModelProto
from tests.onnx.making import model, node, value

import vivace
from vivace.base.errors import InputError
from vivace.lower import image
from vivace.runtime.calls import Calls
from vivace.runtime.engine import Engine

Array = np.ndarray
HEADS, DEPTH, PAST, NEW, ROOM = 2, 4, 5, 3, 11


def decoder(past: int | str = "p") -> ModelProto:
    """Attention over two caches, of which that of the keys has its rows as columns."""
    nodes = [
        node("Neg", "x", "k"), node("Transpose", "k", "kt", perm=[0, 1, 3, 2]), node("Relu", "x", "v"),
        node("Concat", "keys kt", "all_keys", axis=3), node("Concat", "values v", "all_values", axis=2),
        node("MatMul", "x all_keys", "s"), node("Softmax", "s", "w", axis=-1), node("MatMul", "w all_values", "y"),
    ]  # fmt: skip
    ins = [("keys", [HEADS, DEPTH, past]), ("values", [HEADS, past, DEPTH]), ("x", [HEADS, "s", DEPTH])]
    inputs = [value(name, ["b", *shape]) for name, shape in ins]
    return model(nodes, inputs, [value(name, None) for name in ("all_keys", "all_values", "y")])


def engine_of(source: ModelProto, threads: int = 1) -> Engine:
    engine = vivace.compile(source, threads=threads)
    assert isinstance(engine, Engine)
    return engine


@pytest.fixture(scope="module")
def engine() -> Engine:
    return engine_of(decoder())


class Caches:
    """Two caches with room for more, full of NaN where nothing was written yet."""

    def __init__(self, batch: int = 1, room: int = ROOM) -> None:
        self.rng = np.random.default_rng(0)
        self.keys = np.full((batch, HEADS, DEPTH, room), np.nan, np.float32)
        self.values = np.full((batch, HEADS, room, DEPTH), np.nan, np.float32)
        self.keys[..., :PAST] = self.numbers(batch, HEADS, DEPTH, PAST)
        self.values[:, :, :PAST] = self.numbers(batch, HEADS, PAST, DEPTH)
        self.batch = batch

    def numbers(self, *shape: int) -> Array:
        return self.rng.standard_normal(shape).astype(np.float32)

    def feeds(self, past: int = PAST, new: int = NEW) -> dict[str, Array]:
        x = self.numbers(self.batch, HEADS, new, DEPTH)
        return {"keys": self.keys[..., :past], "values": self.values[:, :, :past], "x": x}

    def outputs(self, length: int = PAST + NEW) -> dict[str, Array]:
        return {"all_keys": self.keys[..., :length], "all_values": self.values[:, :, :length]}


def check(engine: Engine, caches: Caches, feeds: dict[str, Array], outputs: dict[str, Array]) -> None:
    want = engine.run({name: a.copy() for name, a in feeds.items()})
    got = engine.run(feeds, outputs)
    for name, a in want.items():
        np.testing.assert_array_equal(got[name], a)
    assert all(got[name] is a for name, a in outputs.items())
    after = outputs["all_values"].shape[2]
    assert np.isnan(caches.keys[..., after:]).all()
    assert np.isnan(caches.values[:, :, after:]).all()


def copied_bytes(engine: Engine, feeds: dict[str, Array], outputs: dict[str, Array] | None = None) -> int:
    """Bytes that steps read and write which only copy."""
    return sum(e.bytes for e in engine.profile(feeds, outputs) if e.kernel.endswith(":copy"))


def test_an_engine_says_which_outputs_begin_with_an_input(engine: Engine) -> None:
    assert engine.appended == {"all_keys": "keys", "all_values": "values"}
    assert engine_of(decoder(past=PAST)).appended == {}


@pytest.mark.parametrize("batch", [1, 3])
def test_a_cache_is_kept_in_place(engine: Engine, batch: int) -> None:
    caches = Caches(batch)
    check(engine, caches, caches.feeds(), caches.outputs())
    for n in range(PAST + NEW, ROOM):  # token by token up to the last place
        check(engine, caches, caches.feeds(n, 1), caches.outputs(n + 1))


def test_nothing_of_a_cache_in_place_is_copied(engine: Engine) -> None:
    caches = Caches()
    feeds = caches.feeds()
    moved = copied_bytes(engine, feeds) - copied_bytes(engine, feeds, caches.outputs())
    assert moved == 2 * 2 * 4 * HEADS * DEPTH * PAST


def test_a_call_without_outputs_follows_one_in_place(engine: Engine) -> None:
    caches = Caches()
    feeds = caches.feeds()
    want = engine.run({name: a.copy() for name, a in feeds.items()})
    for _ in range(2):
        check(engine, caches, feeds, caches.outputs())
        for outputs in (None, {}, {"y": np.empty((1, HEADS, NEW, DEPTH), np.float32)}):
            for name, a in engine.run(feeds, outputs).items():
                np.testing.assert_array_equal(a, want[name])
                assert not np.shares_memory(a, caches.keys)


def test_caches_in_place_are_checked_in_native_code_only(engine: Engine) -> None:
    caches = Caches()
    first = caches.feeds()
    with mock.patch.object(Calls, "_examined", side_effect=AssertionError("examined")):
        engine.run(first, caches.outputs())
        for n in range(PAST + NEW, ROOM):
            engine.run(caches.feeds(n, 1), caches.outputs(n + 1))
        engine.run(first, caches.outputs())


def test_caches_with_gaps_that_lie_elsewhere_are_copied_into(engine: Engine) -> None:
    caches, other = Caches(), Caches()
    feeds = other.feeds()
    caches.keys[:], caches.values[:] = np.nan, np.nan
    check(engine, caches, feeds, caches.outputs())


def test_rooms_need_no_plans_of_memory_of_their_own(engine: Engine) -> None:
    engine.run(Caches().feeds())
    planned = len(engine._planner.planned)
    for room in (ROOM, 10 * ROOM, 100 * ROOM):
        caches = Caches(room=room)
        check(engine, caches, caches.feeds(), caches.outputs())
    assert len(engine._planner.planned) == planned


def test_one_cache_in_place_and_one_elsewhere(engine: Engine) -> None:
    caches = Caches()
    feeds = caches.feeds()
    feeds["values"] = feeds["values"].copy()
    check(engine, caches, feeds, caches.outputs())


def test_an_empty_cache_grows_in_place(engine: Engine) -> None:
    caches = Caches()
    caches.keys[:], caches.values[:] = np.nan, np.nan
    check(engine, caches, caches.feeds(0, 4), caches.outputs(4))
    check(engine, caches, caches.feeds(4, 1), caches.outputs(5))


def test_an_output_that_begins_elsewhere_than_its_input(engine: Engine) -> None:
    """Rows of the cache are overwritten while they are read: the inputs are copied before."""
    caches = Caches()
    feeds = caches.feeds(past=2)
    feeds["keys"], feeds["values"] = caches.keys[..., 1:3], caches.values[:, :, 1:3]
    check(engine, caches, feeds, caches.outputs(2 + NEW))


def test_other_inputs_over_which_a_cache_is_written_are_copied(engine: Engine) -> None:
    caches = Caches()
    feeds = caches.feeds(new=1)
    feeds["x"] = caches.values[:, :, PAST : PAST + 1]
    feeds["x"][:] = caches.numbers(*feeds["x"].shape)
    check(engine, caches, feeds, caches.outputs(PAST + 1))


def test_outputs_of_one_length_have_one_room_or_no_gaps(engine: Engine) -> None:
    caches, wider = Caches(), Caches(room=ROOM + 1)
    feeds, outputs = caches.feeds(), caches.outputs()
    for wrong in (
        {"all_keys": outputs["all_keys"]},
        {**outputs, "all_values": wider.outputs()["all_values"]},
        {**outputs, "all_values": outputs["all_values"][:, ::-1]},
        {**outputs, "y": np.empty((1, HEADS, NEW, 2 * DEPTH), np.float32)[..., ::2]},
    ):
        with pytest.raises(InputError, match="C-contiguous"):
            engine.run(feeds, wrong)
    for empty in (outputs["all_values"][:, :, :0], np.empty((2, HEADS, ROOM, 0), np.float32)):
        with pytest.raises(InputError, match="Expected"):
            engine.run(feeds, {**outputs, "all_values": empty})
    dense = {name: a.copy() for name, a in outputs.items()}
    check(engine, Caches(), feeds, dense)


def test_slices_of_a_batch_keep_caches_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "NEAR_CACHES", 0)
    engine, caches = engine_of(decoder()), Caches(batch=3)
    feeds = caches.feeds()
    assert [c.step for c in engine.traces(feeds)[0]].count(0) == 3
    check(engine, caches, feeds, caches.outputs())


def test_caches_in_place_that_are_one_are_refused() -> None:
    nodes = [node("Concat", f"past{i} x", f"all{i}", axis=1) for i in (0, 1)]
    inputs = [*(value(f"past{i}", ["b", "p"]) for i in (0, 1)), value("x", ["b", "s"])]
    engine = engine_of(model(nodes, inputs, [value(f"all{i}", None) for i in (0, 1)]))
    cache = np.zeros((2, 8), np.float32)
    feeds = {"past0": cache[:, :3], "past1": cache[:, :3], "x": np.ones((2, 1), np.float32)}
    with pytest.raises(InputError, match="'all0' and 'all1' lie over each other"):
        engine.run(feeds, {"all0": cache[:, :4], "all1": cache[:, :4]})


def test_a_saved_engine_keeps_caches_in_place(engine: Engine, tmp_path: Path) -> None:
    engine.save(tmp_path / "m.vivace")
    again, caches = vivace.load(tmp_path / "m.vivace"), Caches()
    assert isinstance(again, Engine)
    feeds = caches.feeds()
    check(again, caches, feeds, caches.outputs())
    assert copied_bytes(again, feeds, caches.outputs()) < copied_bytes(again, feeds)


def test_a_shadowed_engine_reads_caches_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIVACE_CHECK", "1")
    engine, caches = engine_of(decoder(), threads=2), Caches()
    check(engine, caches, caches.feeds(), caches.outputs())


def test_an_input_that_others_read_is_no_cache() -> None:
    nodes = [node("Concat", "past x", "all", axis=1), node("Relu", "past", "y")]
    source = model(nodes, [value("past", ["b", "p"]), value("x", ["b", "s"])], [value("all", None), value("y", None)])
    assert engine_of(source).appended == {}


def test_whoever_reads_a_cache_reads_it_where_it_lies() -> None:
    readers = [
        node("Reshape", "all flat", "flattened"), node("Exp", "flattened", "a"), node("CumSum", "all two", "b"),
        node("TopK", "all k", "c d", axis=2), node("Softmax", "all", "e", axis=2), node("Split", "all", "f g", axis=1),
        node("Sub", "f g", "h"), node("Pad", "all pads", "i", mode="reflect"), node("MatMul", "all w", "j"),
    ]  # fmt: skip
    nodes = [node("Relu", "x", "r"), node("Concat", "values r", "all", axis=2), *readers]
    constants = {
        "flat": np.array([0, -1]), "two": np.array(2), "k": np.array([2]), "pads": np.array([0, 0, 1, 0, 0, 0, 2, 0]),
        "w": np.random.default_rng(1).standard_normal((DEPTH, 3)).astype(np.float32),
    }  # fmt: skip
    ins = [value("values", ["b", HEADS, "p", DEPTH]), value("x", ["b", HEADS, "s", DEPTH])]
    outs = [value(name, None) for name in ("all", *"abcdehij")]
    engine, caches = engine_of(model(nodes, ins, outs, constants)), Caches(batch=2)
    assert engine.appended == {"all": "values"}
    feeds = {name: a for name, a in caches.feeds().items() if name != "keys"}
    want = engine.run(feeds)
    got = engine.run(feeds, {"all": caches.values[:, :, : PAST + NEW]})
    for name, a in want.items():
        np.testing.assert_array_equal(got[name], a)
    assert np.isnan(caches.values[:, :, PAST + NEW :]).all()
