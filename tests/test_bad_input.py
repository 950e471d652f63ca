"""What a person or a broken disk can do to us, end to end: one error that says what and where, no crash, no half file.

Damaged and hostile model files are in `tests/onnx/test_reader.py`, damaged engine files in
`tests/runtime/test_engine.py`, exit codes in `tests/cli/test_app.py`.
"""

from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.images import build_image

import vivace
from vivace.base.cache import default_cache
from vivace.base.dims import symbol
from vivace.base.dtypes import DType
from vivace.base.errors import EngineError, InputError, ModelError, ShapeError, UnsupportedError, VivaceError
from vivace.base.events import collecting
from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Type
from vivace.graph.reference import evaluate
from vivace.onnx.importer import import_model
from vivace.options import choose_isa
from vivace.runtime.engine import Engine
from vivace.tuning import sizes_text

posix = pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")


def model(n_layers: int = 2, op: str = "Relu") -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.standard_normal((32, 32), np.float32), f"w{i}") for i in range(n_layers)]
    nodes, last = [], "x"
    for i in range(n_layers):
        nodes += [
            helper.make_node("MatMul", [last, f"w{i}"], [f"m{i}"], f"product{i}"),
            helper.make_node(op, [f"m{i}"], [f"y{i}"], f"act{i}"),
        ]
        last = f"y{i}"
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 32])
    y = helper.make_tensor_value_info(last, TensorProto.FLOAT, ["N", 32])
    graph = helper.make_graph(nodes, "net", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def run(graph: Graph, *inputs: np.ndarray) -> list[np.ndarray]:
    image = build_image(graph, choose_isa("host"), True)
    out = Engine(image, 1)(*inputs)
    return list(out) if isinstance(out, tuple) else [out]


# ---- inputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("feed", "what"),
    [
        ({}, r"engine\.run: missing inputs \['x'\]\. Expected x: f32\[N,32\]"),
        ({"z": np.zeros((1, 32), np.float32)}, r"missing inputs \['x'\] and unknown inputs \['z'\]"),
        (
            {"x": np.zeros((1, 32))},
            r"input 'x': the array has dtype float64\. Expected .*\. Try: array\.astype\('float32'\)",
        ),
        (
            {"x": np.zeros((32,), np.float32)},
            r"input 'x': the array has rank 1, shape \[32\]\. Expected x: f32\[N,32\]",
        ),
        ({"x": np.zeros((2, 31), np.float32)}, r"input 'x': axis 1 is 31, shape \[2, 31\]\. Expected 32"),
        ({"x": None}, r"input 'x': the array has dtype object"),
        ({"x": "text"}, r"input 'x': the array has dtype <U4"),
    ],
    ids=["missing", "unknown", "dtype", "rank", "size", "none", "text"],
)
def test_inputs_that_do_not_fit(feed: dict[str, np.ndarray], what: str) -> None:
    engine = vivace.compile(model(), threads=1)
    with pytest.raises(InputError, match=what):
        engine.run(feed)


def test_sizes_that_the_model_cannot_take() -> None:
    """A dim that a table bounds is checked: what lies behind the table must not be read."""
    b = Builder()
    length = symbol("length", 0, 16)
    x = b.input("x", Type(DType.f32, (length, 4)))
    table = b.const(np.ones((16, 4), np.float32))
    graph = b.finish([b.add(x, b.slice(table, starts=(0, 0), sizes=(length, 4), steps=(1, 1)))])
    assert run(graph, np.zeros((16, 4), np.float32))[0].sum() == 64
    with pytest.raises(InputError, match=r"input 'x': axis 0 is 17\. Expected length with length from 0 to 16"):
        run(graph, np.zeros((17, 4), np.float32))


def test_sizes_that_leave_less_than_nothing() -> None:
    text = "m (float[1, 1, A, 4] a, float[1, 1, B, 4] b) => (float[1, 1, C, 4] y)"
    body = "{ c = Concat<axis = 2>(a, b)  y = MaxPool<kernel_shape = [5, 1]>(c) }"
    engine = vivace.compile(
        onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 17]> {text} {body}'), threads=1
    )
    a, b = (np.ones((1, 1, n, 4), np.float32) for n in (1, 5))
    assert engine(a, b).shape == (1, 1, 2, 4)
    with pytest.raises(ShapeError, match=r"would be \[1, 1, -2, 4\]"):
        engine(a, a)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"threads": 0}, "threads is 0. Expected 1 to 64"),
        ({"threads": 5000}, "threads is 5000. Expected 1 to 64"),
        ({"threads": "2"}, "threads is '2'. Expected 1 to 64"),
        ({"providers": ()}, "providers: unknown provider ''. Expected native, onnxruntime"),
        ({"disable": "winograde"}, r"disable: nothing is called 'winograde'. Expected winograd, .*\. Try: winograd\."),
        ({"shapes": {"x": 8}}, r"shapes\['x'\]: the shape 8. Expected sizes, as in"),
        ({"shapes": {"x": (-1, 8)}}, r"shapes\['x'\]: the shape \(-1, 8\). Expected sizes, as in"),
        ({"timing_cache": __file__, "tune": "fast"}, "is no timing cache. Expected a file of JSON lines"),
        ({"target": "z80"}, "unknown target 'z80'. Expected host, sse, avx2, avx512, or one with extras"),
        ({"providers": ("abacus",)}, "providers: unknown provider 'abacus'. Expected native, onnxruntime"),
        ({"max_drop": 0.1}, "a tolerance has no effect with fixed formats. Expected precision='auto'"),
        ({"metric": "top1", "precision": "bf16"}, "a tolerance has no effect with fixed formats"),
        ({"calibration": {}}, "no error is measured in f32. Expected another precision"),
        ({"precision": "f7"}, "precision: 'f7' is not available. Expected f32, bf16"),
        ({"threads": True}, "threads is True. Expected 1 to 64"),
        ({"providers": None}, "providers: unknown provider None. Expected native, onnxruntime"),
        ({"shapes": [(1, 32)]}, "shapes: they are of type list. Expected shapes by input name"),
        ({"shapes": {"x": 2.5}}, r"shapes\['x'\]: the shape 2.5. Expected sizes, as in"),
        ({"shapes": {"x": (1 << 62, 32)}}, r"dims \[4611686018427387904, 32\] make .* bytes. Expected"),
        ({"shapes": {"q": (1, 2)}}, "no input is called 'q'"),
        ({"shapes": {"x": (1, 2, 3)}}, "input 'x': is given shape \\(1, 2, 3\\). Expected 2 dims"),
        ({"shapes": {"x": (1, 31)}}, "input 'x': is given the size 31. Expected 32, as the model declares"),
    ],
    ids=lambda v: str(v)[:20],
)
def test_options_that_do_not_exist(options: dict, what: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(VivaceError, match=what):
        vivace.compile(model(), **options)


@pytest.mark.parametrize("source", [None, 3, model().graph], ids=lambda s: type(s).__name__)
def test_what_is_no_model(source: object) -> None:
    with pytest.raises(InputError, match=f"a model of type {type(source).__name__}. Expected the path of an ONNX file"):
        vivace.compile(source)


def test_a_branch_that_the_given_shapes_contradict() -> None:
    """The other branch may be the one that runs: sizes stay open, and the engine says so. Elsewhere a contradiction is
    one."""
    branching = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 17]>
        pick (bool c, float[N, 4, K] x) => (float[N, 4] y)
        <int64[1] two = {2}, int64 one = {1}> {
            y = If (c) <
                then_branch = one_wide () => (float[N, 4] p) {
                    m = MaxPool<kernel_shape = [2], strides = [2]>(x)
                    size = Shape<start = 2, end = 3>(m)  is_one = Equal(size, one)
                    h = If (is_one) <then_branch = a () => (g) { g = Squeeze(m, two) },
                                     else_branch = b () => (k) { k = Identity(m) }>
                    t = Transpose<perm = [1, 0]>(h)  p = Transpose<perm = [1, 0]>(t)
                },
                else_branch = any_width () => (float[N, 4] q) { q = ReduceSum<keepdims = 0>(x, two) }
            >
        }
    """)
    with collecting() as records:
        engine = vivace.compile(branching, threads=1, shapes={"x": (2, 4, 5)})
    assert "cannot run at the given shapes" in str(engine.stats["shapes_note"]) and not records
    assert engine(np.array(False), np.ones((3, 4, 7), np.float32)).tolist() == [[7.0] * 4] * 3
    straight = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 17]>
        net (float[N, K] x) => (float[N, 1] y) <float[4, 1] w = {1, 1, 1, 1}> { y = MatMul(x, w) }
    """)
    with pytest.raises(ModelError):
        vivace.compile(straight, shapes={"x": (2, 5)})


BRANCHING = """
    <ir_version: 9, opset_import: ["" : 17]>
    pick (bool c, float[N] x, float[M] z) => (float[K] y) <int64[1] seven = {7}> {
        y = If (c) <then_branch = one () => (float[K] p) { THEN },
                    else_branch = all () => (float[K] q) { OTHER }>
    }
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_a_branch_runs_only_at_sizes_that_it_is_meant_for(threads: int, tmp_path: Path) -> None:
    """What it learnt of sizes is checked when it runs, and nowhere else; a later run is none the worse."""
    text = BRANCHING.replace("THEN", "g = Gather(x, seven)  p = Mul(g, z)").replace("OTHER", "q = Neg(z)")
    model = onnx.parser.parse_model(text)
    assert sizes_text(import_model(model))[1] == "M=1,N=8"  # what is measured runs at sizes that all branches take
    engine = vivace.compile(model, threads=threads, providers=("native",))
    engine.save(tmp_path / "m.vivace")
    z = np.float32([3])
    for e in (engine, vivace.load(tmp_path / "m.vivace", threads=threads)):
        for _ in range(2):
            assert e(np.array(False), np.ones(2, np.float32), z) == [-3]
            with pytest.raises(ShapeError, match=r"the branch or body that runs .* Expected N from 8 to any"):
                e(np.array(True), np.ones(7, np.float32), z)
            assert e(np.array(True), np.arange(8, dtype=np.float32), z) == [21]


TURNING = """
    <ir_version: 9, opset_import: ["" : 17]>
    turn (int64 n, float[N] x, float[1] s) => (float[1] y) <int64[1] seven = {7}> {
        y = Loop (n, , s) <body = add (int64 i, bool go, float[1] a) => (bool more, float[1] b) {
            more = Identity(go)  g = Gather(x, seven)  b = Add(a, g)
        }>
    }
"""


def test_the_body_of_a_loop_without_turns_asks_nothing_of_sizes() -> None:
    engine = vivace.compile(onnx.parser.parse_model(TURNING), threads=1, providers=("native",))
    x, s = np.arange(8, dtype=np.float32), np.float32([1])
    for _ in range(2):
        assert engine(np.array(0), x[:3], s) == [1]
        with pytest.raises(ShapeError, match=r"the branch or body that runs .* Expected N from 8 to any"):
            engine(np.array(1), x[:7], s)
        assert engine(np.array(20), x, s) == [141]
    certain = TURNING.replace("int64 n, ", "").replace("seven = {7}", "seven = {7}, int64 n = {2}")
    engine = vivace.compile(onnx.parser.parse_model(certain), threads=1, providers=("native",))
    assert engine(x, s) == [15]
    with pytest.raises(ShapeError, match="input 'x': axis 0 is 7"):
        engine(x[:7], s)


def test_sizes_that_only_one_branch_takes_for_equal_stay_apart() -> None:
    text = BRANCHING.replace("THEN", "p = Add(x, z)")
    engine = vivace.compile(onnx.parser.parse_model(text.replace("OTHER", "q = Neg(x)")), threads=1)
    (reason,) = {p.reason for p in engine.placement}
    assert reason == "one of its branches needs M to be N; its sizes only show when it runs"
    x, z = np.float32([1, 2]), np.float32([5, 6, 7])
    assert engine(np.array(False), x, z).tolist() == [-1, -2]
    assert engine(np.array(True), x, z[:2]).tolist() == [6, 8]
    engine = vivace.compile(onnx.parser.parse_model(text.replace("OTHER", "q = Sub(z, x)")), threads=1)
    assert engine.inputs[1].shape == engine.inputs[2].shape
    assert {p.provider for p in engine.placement} == {"native"}


def test_engines_are_not_pickled() -> None:
    engine = vivace.compile(model(1), threads=1)
    for copying in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="save it, and load the file in the other process"):
            copying(engine)


def test_what_open_sizes_leave_to_a_provider_says_why() -> None:
    """The rank of a result, or how heads share keys, that only a run tells."""
    scatter = "(float[4,5] x, int64[K,D] i, float[K,E] u) => (float[4,5] y) { y = ScatterND(x, i, u) }"
    attention = "(float[B,H,S,8] x, float[B,G,T,8] k) => (float[B,H,S,8] y) { y = Attention(x, k, k) }"
    x, at, u = np.zeros((4, 5), np.float32), np.array([[1], [3]]), np.ones((2, 5), np.float32)
    q, k = np.zeros((1, 4, 3, 8), np.float32), np.ones((1, 2, 5, 8), np.float32)
    cases = ((scatter, "how many coordinates", (x, at, u), 10), (attention, "its number of heads", (q, k), 4 * 3 * 8))
    for text, why, arrays, total in cases:
        source = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]> m {text}')
        engine = vivace.compile(source, threads=1)
        assert [p.reason.startswith(why) for p in engine.placement] == [True]
        assert np.asarray(engine(*arrays)).sum() == total


def test_native_alone_refuses_what_it_cannot_do() -> None:
    with pytest.raises(UnsupportedError, match=r"1 nodes have no kernel of ours: act0\..*Try: providers="):
        vivace.compile(model(1, "NonZero"), providers=("native",))


# ---- numbers --------------------------------------------------------------------------------------------------------

STRANGE = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, 3.4e38, -1.5], np.float32)


@pytest.mark.parametrize(
    "op", ["relu", "abs", "neg", "sqrt", "exp", "tanh", "sigmoid", "floor", "sign", "isnan", "erf"]
)
def test_nan_and_infinity_pass_through_functions(op: str) -> None:
    b = Builder()
    graph = b.finish([getattr(b, op)(b.input("x", Type(DType.f32, (37,))))])
    x = np.resize(STRANGE, 37)
    np.testing.assert_allclose(run(graph, x)[0], evaluate(graph, [x])[0], rtol=1e-6, atol=1e-45)


@pytest.mark.parametrize("op", ["max", "min", "add", "mul", "div"])
def test_nan_and_infinity_meet(op: str) -> None:
    b = Builder()
    x, y = (b.input(n, Type(DType.f32, (64,))) for n in "xy")
    graph = b.finish([getattr(b, op)(x, y)])
    feed = [np.repeat(STRANGE, 8), np.tile(STRANGE, 8)]
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(run(graph, *feed)[0], evaluate(graph, feed)[0], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "op", ["reduce_max", "reduce_min", "reduce_sum", "reduce_mean", "softmax", "matmul", "max_pool", "avg_pool"]
)
def test_one_strange_number_among_many(op: str, bad: float) -> None:
    b = Builder()
    x = b.input("x", Type(DType.f32, (1, 6, 7, 19)))
    window = {
        "kernel": (3, 3),
        "strides": (1, 1),
        "dilations": (1, 1),
        "before": (1, 1),
        "after": (1, 1),
        "layout": "NHWC",
    }
    match op:
        case "softmax":
            y = b.softmax(x, axis=3)
        case "matmul":
            y = b.matmul(x, b.const(np.ones((19, 5), np.float32)))
        case "max_pool" | "avg_pool":
            y = getattr(b, op)(x, count_include_pad=False, **window)
        case _:
            y = getattr(b, op)(x, axes=(3,), keepdims=False)
    graph = b.finish([y])
    data = np.random.default_rng(1).standard_normal((1, 6, 7, 19)).astype(np.float32)
    data[0, 3, 4, 17] = bad
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(run(graph, data)[0], evaluate(graph, [data])[0], rtol=1e-5, atol=1e-5)


def test_sizes_of_zero() -> None:
    engine = vivace.compile(model(), threads=2)
    for n in (0, 3, 0):
        (y,) = engine.run({"x": np.ones((n, 32), np.float32)}).values()
        assert y.shape == (n, 32)


def test_any_number_of_empty_rows_takes_no_time() -> None:
    b = Builder()
    x = b.input("x", Type(DType.f32, (symbol("N"), symbol("M"))))
    y = b.softmax(b.neg(x), axis=1)
    assert run(b.finish([y]), np.zeros((1 << 40, 0), np.float32))[0].shape == (1 << 40, 0)


def test_sums_over_nothing_are_zero() -> None:
    b = Builder()
    k = symbol("K")
    x, y = b.input("x", Type(DType.f32, (3, k))), b.input("y", Type(DType.f32, (k, 5)))
    graph = b.finish([b.matmul(x, y), b.reduce_sum(x, axes=(1,), keepdims=False)])
    product, total = run(graph, np.ones((3, 0), np.float32), np.ones((0, 5), np.float32))
    assert product.shape == (3, 5) and not product.any() and not total.any()


# ---- files and processes --------------------------------------------------------------------------------------------


@posix
def test_a_full_disk_leaves_no_half_engine(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(model(40).SerializeToString())
    done = script(
        """
        import resource, signal, vivace
        engine = vivace.compile("m.onnx", threads=1)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            engine.save("m.vivace")
        except vivace.VivaceError as e:
            print(type(e).__name__, e)
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "m.vivace" in done.stdout and "File too large" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx"]


@pytest.mark.parametrize("options", [{}, {"level": 1, "disable": ("epilogues", "trees")}])
def test_an_engine_for_another_machine_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    source = vivace.compile(model(), threads=1, **options)
    source.save(tmp_path / "m.vivace")
    from vivace.runtime import saved

    opened = saved.SavedEngine.__init__

    def elsewhere(self: saved.SavedEngine, path: Path) -> None:
        opened(self, path)
        self.header["flags"] = [*self.header["flags"], "avx4096"]

    monkeypatch.setattr(saved.SavedEngine, "__init__", elsewhere)
    again = vivace.load(tmp_path / "m.vivace", threads=1)
    x = np.ones((3, 32), np.float32)
    np.testing.assert_array_equal(again(x), source(x))
    assert again.facts["level"] == options.get("level", 99)
    assert again.facts["disable"] == list(options.get("disable", ()))
    assert again.stats["n_kernels"] == source.stats["n_kernels"]


def test_a_model_is_no_engine_nor_an_engine_a_model(tmp_path: Path) -> None:
    vivace.compile(model(1), threads=1).save(tmp_path / "m.vivace")
    with pytest.raises(ModelError, match=r"m\.vivace: is a saved engine\. Expected an ONNX model\. Try: vivace\.load"):
        vivace.compile(tmp_path / "m.vivace")
    (tmp_path / "m.onnx").write_bytes(model().SerializeToString())
    with pytest.raises(
        EngineError, match=r"m\.onnx: is no saved engine\. Expected .*\. Try: vivace\.compile for models"
    ):
        vivace.load(tmp_path / "m.onnx")
    with pytest.raises(EngineError, match=r"none\.vivace: cannot be read: No such file"):
        vivace.load(tmp_path / "none.vivace")


@pytest.mark.filterwarnings("ignore:.*damaged entry")
def test_damaged_cache_entries_are_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIVACE_CACHE_DIR", str(tmp_path))
    x = np.ones((3, 32), np.float32)
    first = vivace.compile(model(), threads=1)
    entries = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert entries and default_cache().root == tmp_path
    for i, path in enumerate(entries):
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 0xFF
        path.write_bytes((b"", bytes(raw), bytes(raw[: len(raw) // 2]))[i % 3])
    second = vivace.compile(model(), threads=1)
    np.testing.assert_array_equal(first(x), second(x))
    assert second.stats["n_kernels_compiled"] == first.stats["n_kernels_compiled"]
    assert vivace.compile(model(), threads=1).stats["n_kernels_compiled"] == 0


def test_two_processes_compile_at_once(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(model().SerializeToString())
    body = """
        import numpy as np, vivace
        e = vivace.compile("m.onnx", threads=1)
        print(float(e(np.ones((3, 32), np.float32)).sum()))
        """
    both = [start(body, tmp_path, VIVACE_CACHE_DIR=str(tmp_path / "cache")) for _ in range(3)]
    results = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0, 0], results
    assert len({out for out, _ in results}) == 1


@posix
def test_an_interrupted_compilation_leaves_no_half_file(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(model().SerializeToString())
    body = """
        import vivace
        from vivace.targets.cpu import jit
        compile_kernel = jit.compile_kernel
        def slow(*args):
            import time
            print("compiling", flush=True)
            time.sleep(0.3)
            return compile_kernel(*args)
        jit.compile_kernel = slow
        vivace.compile("m.onnx", threads=1).save("m.vivace")
        """
    cache = tmp_path / "cache"
    process = start(body, tmp_path, VIVACE_CACHE_DIR=str(cache))
    assert process.stdout is not None
    assert process.stdout.readline() == "compiling\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors
    assert sorted(p.name for p in tmp_path.iterdir()) in (["cache", "m.onnx"], ["m.onnx"])
    whole = start(body, tmp_path, VIVACE_CACHE_DIR=str(cache))
    whole.communicate(timeout=120)
    assert whole.returncode == 0 and (tmp_path / "m.vivace").exists()


def start(body: str, folder: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(body)],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
    )


def script(body: str, folder: Path) -> subprocess.CompletedProcess[str]:
    process = start(body, folder)
    out, errors = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"precision": "auto", "max_drop": 0.1, "providers": "auto"}, "precision"),
        ({"precision": "auto", "max_drop": 0.1, "tune": "fast"}, "tune"),
        ({"providers": "auto", "calibration": {"x": np.ones((3, 32), np.float32)}}, "calibration"),
        ({"providers": "onnxruntime", "precision": "bf16"}, "precision"),
        ({"providers": ("openvino",), "precision": "auto", "max_drop": 0.1}, "precision"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(options: dict[str, Any], where: str) -> None:
    with pytest.raises(InputError) as caught:
        vivace.compile(model(), **options)
    assert caught.value.where == where
