"""Engines: built from a graph, checked against the reference, saved, loaded, damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.images import build_image

import vivace
from vivace.base.dims import symbol
from vivace.base.dtypes import DType
from vivace.base.errors import EngineError, InputError, ShapeError
from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Type
from vivace.graph.reference import evaluate
from vivace.lower.image import Part
from vivace.options import choose_isa
from vivace.runtime.arguments import apart
from vivace.runtime.engine import Engine
from vivace.runtime.partitioned import PartitionedEngine
from vivace.runtime.saved import Program

rng = np.random.default_rng(7)


def random(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def small_net() -> Graph:
    """A stem, a residual block, a concatenation: every kind of placement."""
    b = Builder()
    x = b.input("x", Type(DType.f32, (1, 3, 20, 20)))
    same = {"dilations": (1, 1), "before": (1, 1), "after": (1, 1), "layout": "NHWC"}
    c = b.conv(
        b.transpose(x, perm=(0, 2, 3, 1)),
        b.const(random(16, 3, 3, 3)),
        b.const(random(16)),
        strides=(2, 2),
        group=1,
        **same,
    )
    p = b.max_pool(b.relu(c), kernel=(3, 3), strides=(2, 2), count_include_pad=False, **same)
    r = b.relu(b.add(b.conv(p, b.const(random(16, 16, 3, 3)), strides=(1, 1), group=1, **same), p))
    d = b.conv(r, b.const(random(16, 1, 3, 3)), strides=(1, 1), group=16, **same)
    cat = b.concat(d, p, axis=3)
    return b.finish([b.reduce_mean(cat, axes=(1, 2), keepdims=False), b.transpose(cat, perm=(0, 3, 1, 2))])


def small_transformer() -> Graph:
    """Symbolic batch and length."""
    b = Builder()
    n, s = symbol("N"), symbol("S")
    x = b.input("x", Type(DType.f32, (n, s, 24)))
    h = b.layer_norm(x, b.const(random(24)), b.const(random(24)), axis=2, epsilon=1e-5)
    heads = [
        b.transpose(b.reshape(b.matmul(h, b.const(random(24, 24) / 5)), shape=(n, s, 3, 8)), perm=(0, 2, 1, 3))
        for _ in range(3)
    ]
    a = b.attention(*heads, scale=8**-0.5, causal=True, softcap=0.0)
    joined = b.reshape(b.transpose(a, perm=(0, 2, 1, 3)), shape=(n, s, 24))
    y = b.add(b.matmul(joined, b.const(random(24, 24) / 5)), x)
    return b.finish([b.add(b.matmul(b.gelu(y), b.const(random(24, 10))), b.const(random(10)))])


def engine_of(graph: Graph, threads: int = 1, target: str = "host") -> Engine:
    return Engine(build_image(graph, choose_isa(target), False), threads, portable=b"")


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("target", ["sse", "avx2", "avx512"])
def test_a_small_net_matches_the_reference(threads: int, target: str) -> None:
    try:
        choose_isa(target)
    except InputError as e:
        pytest.skip(str(e))
    graph = small_net()
    x = random(1, 3, 20, 20)
    got = engine_of(graph, threads, target)(x)
    for a, b in zip(got, evaluate(graph, [x]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (3, 33), (1, 100), (0, 4), (2, 0)])
def test_symbolic_shapes_need_no_new_code(shape: tuple[int, int]) -> None:
    graph = small_transformer()
    engine = engine_of(graph, 2)
    for size in (shape, (2, 5), shape):
        x = random(*size, 24)
        np.testing.assert_allclose(engine(x), evaluate(graph, [x])[0], rtol=1e-4, atol=1e-4)


def test_a_saved_engine_gives_the_same_bits(tmp_path: Path) -> None:
    engine = engine_of(small_net())
    engine.save(tmp_path / "net.vivace")
    again = vivace.load(tmp_path / "net.vivace", threads=1)
    x = random(1, 3, 20, 20)
    for a, b in zip(engine(x), again(x), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [str(s) for s in again.inputs] == [str(s) for s in engine.inputs]


def test_every_damaged_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "net.vivace"
    engine_of(small_net()).save(path)
    whole = path.read_bytes()
    used = [i for i in range(0, len(whole), 997) if whole[i : i + 1] != b"\0"]
    for at in [0, 9, 20, 40, *used]:
        broken = bytearray(whole)
        broken[at] ^= 0x41
        path.write_bytes(broken)
        with pytest.raises(EngineError):
            vivace.load(path)
    for length in (0, 7, 51, 52, 3000, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(EngineError):
            vivace.load(path)


def test_inputs_are_checked() -> None:
    engine = engine_of(small_net())
    x = random(1, 3, 20, 20)
    with pytest.raises(InputError, match="missing inputs"):
        engine.run({"y": x})
    with pytest.raises(InputError, match="float64"):
        engine.run({"x": x.astype(np.float64)})
    with pytest.raises(InputError, match="axis 2 is 21"):
        engine.run({"x": random(1, 3, 21, 20)})
    with pytest.raises(InputError, match="rank 3"):
        engine.run({"x": x[0]})


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ((None, {}), r"the inputs are of type NoneType\. Expected a dict of arrays by name, with x: f32\[1,3,20,20\]"),
        ((["y"], {}), r"the inputs are of type list.*Try: engine\.run\(\{"),
        ((random(1, 3, 20, 20),), "the inputs are of type ndarray"),
        (({"x": random(1, 3, 20, 20)}, ["y"]), "the outputs are of type list"),
        (({"x": random(1, 3, 20, 20)}, {"nothing": random(3)}), r"unknown outputs \['nothing'\]\. Expected "),
        (({"x": random(1, 3, 20, 20)}, {"out": [1.0]}), "output 'out': is of type list"),
    ],
    ids=["none", "names", "array", "outputs", "unknown", "list"],
)
@pytest.mark.parametrize("is_partitioned", [False, True], ids=["whole", "parts"])
def test_other_ways_to_call_are_explained(arguments: tuple, what: str, is_partitioned: bool) -> None:  # type: ignore[type-arg]
    engine = engine_of(small_net())
    if is_partitioned:
        engine = in_parts(engine)  # type: ignore[assignment]
    assert "f32[1,3,20,20]" in repr(engine) and "engine" in repr(engine)
    first = engine.outputs[0].name
    given = [{first if k == "out" else k: v for k, v in a.items()} if isinstance(a, dict) else a for a in arguments]
    with pytest.raises(InputError, match=what.replace("'out'", f"'{first}'")):
        engine.run(*given)


def in_parts(engine: Engine) -> PartitionedEngine:
    part = Part("native", engine.inputs, engine.outputs, engine.image)
    program = Program((part,), engine.inputs, engine.outputs, [], {})
    return PartitionedEngine(program, [engine], 1, bytes)


def test_any_strides_and_given_outputs() -> None:
    engine = engine_of(small_net())
    x = random(1, 20, 20, 3).transpose(0, 3, 1, 2)
    want = engine.run({"x": x.copy()})
    mine = {name: np.full_like(a, np.nan) for name, a in want.items()}
    got = engine.run({"x": x}, outputs=mine)
    for name, a in want.items():
        assert got[name] is mine[name]
        np.testing.assert_array_equal(got[name], a)
    name = next(iter(mine))
    mine[name].setflags(write=False)
    with pytest.raises(InputError, match=rf"output '{name}': the array is read-only float32"):
        engine.run({"x": x}, outputs=mine)


def memoryview_of(array: np.ndarray) -> np.ndarray:
    """The same memory, behind something that is no array."""
    return np.frombuffer(memoryview(array), array.dtype)


def test_sizes_that_shapes_do_not_tell() -> None:
    b = Builder()
    engine = engine_of(b.finish([b.relu(b.input("x", Type(DType.f32, (symbol("N") * symbol("M"),))))]))
    with pytest.raises(ShapeError, match="do not tell"):
        engine.run({"x": random(6)})


def test_inputs_are_copied_where_a_result_is_written_over_them() -> None:
    one, other = np.arange(8.0), np.arange(8.0)
    cases = [
        (one, other, False),
        (one, one, True),
        (one, one[2:], True),
        (one[:4], one, True),
        (one[:4], one[4:], False),
        (memoryview_of(one), one[2:], True),
        (one[2:], memoryview_of(one), True),
    ]
    for given, result, is_copied in cases:
        (got,) = apart([given], [other.copy(), result])
        assert (got is not given) == is_copied
        np.testing.assert_array_equal(got, given)


def test_results_do_not_lie_over_each_other() -> None:
    b = Builder()
    x = b.input("x", Type(DType.f32, (symbol("N"), 4)))
    engine = engine_of(b.finish([b.neg(x), b.exp(x)]))
    (one, other), given = (s.name for s in engine.outputs), random(2, 4)
    memory = np.zeros((5, 4), np.float32)
    for _ in range(2):  # a call like the last one too
        engine.run({"x": given}, {one: memory[:2], other: memory[2:4]})
        for y in (memory[:2], memory[1:3]):
            with pytest.raises(InputError, match=f"{one!r} and {other!r} lie over each other"):
                engine.run({"x": given}, {one: memory[:2], other: y})
    np.testing.assert_array_equal(memory[:2], -given)


def test_the_arena_is_near_its_lower_bound() -> None:
    stats = engine_of(small_net()).stats
    assert stats["arena_bytes"] <= 1.05 * stats["arena_lower_bound_bytes"]
