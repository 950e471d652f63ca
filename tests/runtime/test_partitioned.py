"""Engines of several parts: sizes that only show when the model runs, sizes that surprise, saving, threads."""

from __future__ import annotations

import inspect
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest

import vivace
from vivace.base.errors import InputError, UnsupportedError
from vivace.base.events import Notice, collecting
from vivace.runtime.engine import Engine
from vivace.runtime.partitioned import PartitionedEngine

MODELS = {
    "compress": """m (float[N, 8] x, bool[N] keep) => (float[M, 4] y)
        <float[8, 4] w = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1, 1,1,1,1, 0,0,0,0, 2,0,0,0, 0,0,0,2}>
        { h = Relu(x)  c = Compress<axis = 0>(h, keep)  y = MatMul(c, w) }""",
    "nonzero": """m (float[N, 8] x) => (float[K] y, float[N, 8] z)
        { e = Exp(x)  one = Constant<value_float = 1.0>()  g = Greater(e, one)  i = NonZero(g)
          t = Transpose<perm = [1, 0]>(i)  v = GatherND(x, t)  s = Sigmoid(v)  y = Mul(s, v)  z = Add(e, x) }""",
    "two of one size": """m (float[N] x) => (float[K] y)
        { zero = Constant<value_float = 0.0>()  a = Greater(x, zero)  b = Not(a)  c = Not(b)
          p = Compress<axis = 0>(x, a)  e = Exp(x)  q = Compress<axis = 0>(e, c)  y = Add(p, q) }""",
    "range": """m (float[N] x, int64 n) => (float[K] y, float[N] z)
        { zero = Constant<value_int = 0>()  one = Constant<value_int = 1>()  r = Range(zero, n, one)
          f = Cast<to = 1>(r)  s = ReduceSum<keepdims = 0>(x)  y = Mul(f, s)  z = Neg(x) }""",
    "reshape": """m (float[N, 6] x, int64[2] shape) => (float[A, B] y)
        { e = Exp(x)  r = Reshape(e, shape)  t = Transpose<perm = [1, 0]>(r)  y = Relu(t) }""",
    "late alone": "m (float[N] x) => (int64[1, K] y) { y = NonZero(x) }",
    "a size from far": """m (float[N, 4] x) => (float[K] y, float[L] z)
        { n = Shape(x)  i = NonZero(x)  t = Transpose<perm = [1, 0]>(i)  v = GatherND(x, t)
          f = Cast<to = 1>(n)  s = ReduceSum<keepdims = 0>(f)  y = Mul(v, s)
          k = Unique<sorted = 1>(y)  u = Relu(k)  z = Add(u, s) }""",
}


def model(name: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 17]> {MODELS[name]}')


def inputs(name: str, n: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    fed: dict[str, np.ndarray] = {}
    for v in model(name).graph.input:
        shape = [d.dim_value if d.HasField("dim_value") else n for d in v.type.tensor_type.shape.dim]
        match v.name:
            case "keep":
                fed["keep"] = rng.random(n) < 0.5
            case "n":
                fed["n"] = np.asarray(3 * n, np.int64)
            case "shape":
                fed["shape"] = np.asarray([3, 2 * n], np.int64)
            case _:
                fed[v.name] = rng.standard_normal(shape).astype(np.float32)
    return fed


def reference(name: str, fed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(model(name).SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, fed), strict=True))


def check(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name, a in want.items():
        assert got[name].shape == a.shape and got[name].dtype == a.dtype
        np.testing.assert_allclose(got[name], a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_only_what_needs_it_leaves_our_code(name: str, tmp_path: Path) -> None:
    engine = vivace.compile(model(name), threads=1)
    assert isinstance(engine, PartitionedEngine)
    late = {"Compress", "NonZero", "Range", "Reshape", "Unique"}
    made_late = {n.output[0] for n in model(name).graph.node if n.op_type in late}
    elsewhere = [p for p in engine.placement if p.provider != "native"]
    assert {p.node.rpartition(":")[2] for p in elsewhere} == made_late
    assert all(p.provider == "onnxruntime" and "size" in p.reason for p in elsewhere)
    engine.save(tmp_path / "m.vivace")
    again = vivace.load(tmp_path / "m.vivace", threads=1)
    assert again.placement == engine.placement and again.inputs == engine.inputs
    for n in (5, 1, 70, 5) if name == "reshape" else (5, 1, 70, 0, 5):
        fed = inputs(name, n, seed=n)
        want = reference(name, fed)
        check(engine.run(fed), want)
        check(again.run(fed), want)


def test_pieces_are_few() -> None:
    engine = vivace.compile(model("two of one size"), threads=1)
    assert [p.provider for p in engine.parts] == ["native", "onnxruntime", "native"]


def test_without_another_provider_such_a_model_is_refused() -> None:
    with pytest.raises(UnsupportedError):
        vivace.compile(model("nonzero"), providers=("native",))


def test_results_go_into_the_arrays_of_the_caller_even_where_they_hold_the_inputs() -> None:
    engine = vivace.compile(model("nonzero"), threads=1)
    fed = inputs("nonzero", 6)
    want = reference("nonzero", fed)
    z = fed["x"]
    got = engine.run(fed, {"z": z})
    assert got["z"] is z
    check(got, want)
    fed = inputs("nonzero", 6)
    with pytest.raises(InputError, match="output 'y'"):
        engine.run(fed, {"y": np.zeros(want["y"].size + 1, np.float32)})
    y = np.zeros_like(want["y"])
    assert engine.run(fed, {"y": y})["y"] is y
    check({"y": y}, {"y": want["y"]})
    with pytest.raises(InputError, match="'y' and 'z' lie over each other"):
        engine.run(fed, {"y": y, "z": y})


def test_it_has_the_face_of_an_engine() -> None:
    """What is asked of engines can be asked of one in parts too."""
    for name in (n for n in vars(Engine) if not n.startswith("_")):
        one, other = inspect.getattr_static(Engine, name), inspect.getattr_static(PartitionedEngine, name, None)
        if callable(one):
            assert callable(other) and inspect.signature(one) == inspect.signature(other), name
        else:
            assert name == "facts" or isinstance(other, property), name
    engine = vivace.compile(model("nonzero"), threads=1)
    assert isinstance(engine, PartitionedEngine)
    fed = inputs("nonzero", 6)
    want = reference("nonzero", fed)
    z = np.zeros_like(fed["x"])
    assert engine.dims_of(fed) == {"N": 6}
    memory = engine.memory({"x": fed["x"].shape})  # of `exp`, whose sizes the inputs tell
    assert memory["arena_bytes"] >= memory["arena_lower_bound_bytes"]
    assert memory["n_late_parts"] == 1
    with pytest.raises(InputError, match=r"engine\.memory: shapes are given for \['q'\]"):
        engine.memory({"q": (3,)})
    lines = [len(r.image.lines) if isinstance(r, Engine) else 1 for r in engine._runners]
    for chunks in engine.traces(fed, 2):
        assert {c.step for c in chunks} <= set(range(sum(lines)))
        assert sum(lines[: lines.index(1)]) in {c.step for c in chunks}
    events = engine.profile(fed, {"z": z})
    assert {e.kernel[0] for e in events} == {str(k) for k in range(len(lines))}
    check({"z": z}, {"z": want["z"]})


def test_inputs_are_checked() -> None:
    engine = vivace.compile(model("compress"), threads=1)
    fed = inputs("compress", 4)
    with pytest.raises(InputError, match="missing"):
        engine.run({"x": fed["x"]})
    with pytest.raises(InputError, match="float64"):
        engine.run({**fed, "x": fed["x"].astype(np.float64)})
    with pytest.raises(InputError, match="axis 0"):
        engine.run({**fed, "keep": fed["keep"][:-1]})
    got = engine(fed["x"].repeat(2, axis=1)[:, ::2], fed["keep"])
    np.testing.assert_allclose(got, reference("compress", fed)["y"], rtol=1e-6)


def test_a_size_that_contradicts_the_compiler_runs_the_whole_model_elsewhere(tmp_path: Path) -> None:
    text = """m (float[N] x, bool[N] keep, float[4] c) => (float[M] y)
        { e = Exp(x)  p = Compress<axis = 0>(e, keep)  y = Add(p, c) }"""  # either one element or four
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 17]> {text}')
    engine = vivace.compile(proto, threads=1)
    x, c = np.arange(5, dtype=np.float32), np.arange(4, dtype=np.float32)
    for n in (4, 1):
        keep = np.arange(5) < n
        with collecting() as seen:
            got = engine(x, keep, c)
        np.testing.assert_allclose(got, np.exp(x[keep]) + c, rtol=1e-6)
        assert any(isinstance(s, Notice) and "as a whole in onnxruntime" in s.text for s in seen) == (n == 1)


def test_runs_from_several_threads() -> None:
    engine = vivace.compile(model("nonzero"), threads=2)
    fed = [inputs("nonzero", 3 + k % 7, seed=k) for k in range(40)]
    want = [reference("nonzero", f) for f in fed]
    with ThreadPoolExecutor(4) as pool:
        for got, w in zip(pool.map(engine.run, fed), want, strict=True):
            check(got, w)


def test_native_parts_are_checked_and_profiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIVACE_CHECK", "1")
    engine = vivace.compile(model("a size from far"), threads=1)
    fed = inputs("a size from far", 5)
    check(engine.run(fed), reference("a size from far", fed))
    assert isinstance(engine, PartitionedEngine)
    assert sum(getattr(r, "n_compared", 0) for r in engine._runners) > 2
    kernels = {e.kernel for e in engine.profile(fed)}
    assert {p.kernel for p in engine.placement} >= kernels and len(kernels) > 3


def test_a_model_of_known_sizes_is_one_engine() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 17]> m (float[N] x) => (float[N] y) {y=Exp(x)}'
    )
    assert isinstance(vivace.compile(proto, threads=1), Engine)


def test_an_input_that_only_dead_operators_read_stays_one_after_loading(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 17]> m (float[N] x, float[N] u) => (float[N] y) {'
        "y = Relu(x)  i = NonZero(u) }"
    )
    engine = vivace.compile(proto, threads=1)
    engine.save(tmp_path / "m.vivace")
    again = vivace.load(tmp_path / "m.vivace", threads=1)
    assert again.inputs == engine.inputs
    assert again.run({"x": np.ones(2, np.float32), "u": np.ones(2, np.float32)})["y"].tolist() == [1, 1]


def test_a_loop_with_such_an_operator_inside_leaves_as_a_whole() -> None:
    text = """m (float[N] x, int64 n) => (float[N] y) {
        e = Exp(x)  yes = Constant<value = bool {1}>()
        s = Loop (n, yes, e) <body = turn (int64 i, bool go, float[N] a) => (bool on, float[N] b) {
            on = Identity(go)  one = Constant<value_float = 1.0>()  large = Greater(a, one)
            k = Compress<axis = 0>(a, large)  t = ReduceSum<keepdims = 0>(k)  h = Mul(a, t)  b = Tanh(h) }>
        y = Sigmoid(s) }"""
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 17]> {text}')
    engine = vivace.compile(proto, threads=1)
    assert isinstance(engine, PartitionedEngine)
    assert [p.provider for p in engine.parts] == ["native", "onnxruntime", "native"]
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for n in (0, 1, 5):
        fed = {"x": np.random.default_rng(n).standard_normal(6).astype(np.float32), "n": np.asarray(n, np.int64)}
        np.testing.assert_allclose(engine.run(fed)["y"], session.run(None, fed)[0], rtol=1e-5, atol=1e-6)


def test_boxes_that_survive_are_read_natively() -> None:
    text = """m (float[1, B, 4] boxes, float[1, 3, B] scores) => (float[K, 4] kept, float[K] best) {
        most = Constant<value_ints = [5]>()  iou = Constant<value_floats = [0.5]>()
        low = Constant<value_floats = [0.3]>()
        p = Sigmoid(scores)  s = NonMaxSuppression(boxes, p, most, iou, low)
        two = Constant<value_ints = [2]>()  three = Constant<value_ints = [3]>()  one = Constant<value_ints = [1]>()
        b = Slice(s, two, three, one)  zero = Constant<value_ints = [0]>()
        first = Constant<value_int = 0>()  all = Gather<axis = 0>(boxes, first)
        axis = Constant<value_ints = [1]>()  i = Squeeze(b, axis)  g = Gather<axis = 0>(all, i)  kept = Relu(g)
        best = ReduceMax<axes = [1], keepdims = 0>(g) }"""
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 17]> {text}')
    engine = vivace.compile(proto, threads=1)
    assert isinstance(engine, PartitionedEngine)
    assert {p.op for p in engine.placement if p.provider != "native"} == {"onnx"}
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    for n in (1, 40):
        corner = rng.random((1, n, 2), np.float32)
        boxes = np.concatenate([corner, corner + 0.1], axis=2)
        fed = {"boxes": boxes, "scores": rng.standard_normal((1, 3, n)).astype(np.float32)}
        for got, want in zip(engine.run(fed).values(), session.run(None, fed), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_an_operator_that_cannot_be_exported_takes_the_model_along() -> None:
    text = """m (float[N, 6] x, int64[2] shape) => (float[A, B] y) { e = Exp(x)  y = Reshape(e, shape) }"""
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 24]> {text}')
    engine = vivace.compile(proto, threads=1)  # Reshape of opset 24 is not that of 23
    assert [p.provider for p in engine.placement] == ["onnxruntime"]
    assert "opset 24" in engine.placement[0].reason
    x = np.arange(12, dtype=np.float32).reshape(2, 6)
    np.testing.assert_allclose(engine(x, np.array([4, 3])), np.exp(x).reshape(4, 3), rtol=1e-6)
    with collecting() as seen:
        narrow = vivace.compile(proto.SerializeToString(), threads=1, precision="bf16")
    assert narrow.stats["precision"] == "f32" and "computed in f32" in str(narrow.stats["precision_note"])
    assert any("computed in f32, not bf16" in str(s) for s in seen)


OLD = {
    "pad": """m (float[N, 6] x, int64[4] p) => (float[A, B] y) { e = Exp(x)  q = Pad(e, p)  y = Relu(q) }""",
    "loop": """m (float[N, 6] x, int64[4] p) => (float[A] y) { zero = Constant<value_ints = [0]>()
        n = ReduceMax<keepdims = 0>(p)  yes = Constant<value = bool {1}>()  e = Exp(x)
        s = Loop (n, yes, e) <body = turn (int64 i, bool go, float[N, 6] a) => (bool on, float[N, 6] b) {
            on = Identity(go)  large = Greater(a, a)  k = NonZero(large)  f = Cast<to = 1>(k)
            t = ReduceSum<axes = [0, 1], keepdims = 0>(f)  m = ReduceMean<axes = [1]>(a)  c = Sub(a, m)
            b = Add(c, t) }>
        y = Sigmoid(s) }""",
}


@pytest.mark.parametrize("name", OLD)
def test_operators_of_old_opsets_leave_alone_or_with_the_model_as_it_was_given(name: str, tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(f'<ir_version: 7, opset_import: ["" : 12]> {OLD[name]}')
    engine = vivace.compile(proto, threads=1)
    assert isinstance(engine, PartitionedEngine)
    around = ["native"] * (name == "pad")  # what is around a NonZero in a loop cannot be written with opset 12
    assert [p.provider for p in engine.parts] == [*around, "onnxruntime", *around]
    engine.save(tmp_path / "m.vivace")
    fed = {"x": np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32), "p": np.array([1, 0, 0, 2])}
    (want,) = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, fed)
    for e in (engine, vivace.load(tmp_path / "m.vivace", threads=1)):
        np.testing.assert_allclose(e.run(fed)["y"], want, rtol=1e-5, atol=1e-6)


def test_parts_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIVACE_EMULATE", "1")
    engine = vivace.compile(model("compress"), threads=1, precision="bf16")
    assert isinstance(engine, PartitionedEngine) and engine.stats["precision"] == "bf16"
    fed = inputs("compress", 9)
    np.testing.assert_allclose(engine.run(fed)["y"], reference("compress", fed)["y"], rtol=2e-2, atol=2e-2)


def test_a_type_that_numpy_lacks_does_not_cross_a_border() -> None:
    text = """m (float[N] x, int64[2] shape) => (float[A, B] y) {
        h = Cast<to = 16>(x)  r = Reshape(h, shape)  y = Cast<to = 1>(r) }"""
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 17]> {text}')
    engine = vivace.compile(proto, threads=1)
    assert {p.provider for p in engine.placement} == {"onnxruntime"}
    x = np.arange(6, dtype=np.float32)
    np.testing.assert_array_equal(engine(x, np.array([2, 3])), x.reshape(2, 3))


def test_text_is_worked_on_elsewhere(tmp_path: Path) -> None:
    text = """<ir_version: 9, opset_import: ["" : 20]>
        m (string[N] a, float[N, 4] x) => (string[N] b, float[N, 4] y) { b = StringConcat(a, a)  y = Relu(x) }"""
    engine = vivace.compile(onnx.parser.parse_model(text))
    fed = {"a": np.array(["u", "vw"], object), "x": np.array([[-1, 0, 1, 2]] * 2, np.float32)}
    assert {p.op: p.provider for p in engine.placement} == {"onnx": "onnxruntime", "relu": "native"}
    engine.save(tmp_path / "m.vivace")
    for e in (engine, vivace.load(tmp_path / "m.vivace")):
        got = e.run(fed)
        assert got["b"].tolist() == ["uu", "vwvw"]
        np.testing.assert_array_equal(got["y"], np.maximum(fed["x"], 0))
