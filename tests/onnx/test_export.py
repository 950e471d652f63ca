"""Exported models: ONNX Runtime computes from them what the reference computes from the graph, and they come back as
they went."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from vivace.base.dims import symbol
from vivace.base.dtypes import DType
from vivace.base.errors import InputError, UnsupportedError
from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Type
from vivace.graph.reference import evaluate
from vivace.graph.rewrite import Example
from vivace.graph.text import print_graph
from vivace.onnx.exporter import export
from vivace.onnx.importer import import_model
from vivace.optimize.check import random_inputs
from vivace.optimize.pipeline import PIPELINE, Level, optimize

ort = pytest.importorskip("onnxruntime")


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return list(session.run(None, {k: v for k, v in feeds.items() if k in names}))


def check(graph: Graph, opset: int = 20, sizes: dict[str, int] | None = None, seed: int = 0) -> onnx.ModelProto:
    model = export(graph, opset)
    feeds = random_inputs(graph, sizes or {"N": 3, "B": 2, "T": 4, "M": 5}, seed)
    want = evaluate(graph, feeds)
    got = run(model, feeds)
    assert [o.name for o in model.graph.output] == [v.name for v in graph.outputs]
    for a, b in zip(want, got, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        np.testing.assert_allclose(b.astype(np.float64), a.astype(np.float64), rtol=3e-5, atol=3e-5)
    return model


EXAMPLES = {
    f"{r.name}-{i}": e
    for p in PIPELINE
    for r in p.rules
    for i, e in enumerate(r.examples)
    if r.name not in ("negate_comparison", "gate_into_weights")  # compares equal floats; channels last, as no file has
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_of_a_rule(name: str) -> None:
    check(Example().graph(EXAMPLES[name]))


def windows(e: Example) -> Any:
    x = e.x("f32[N,4,9,8]")
    w = {"strides": (2, 1), "dilations": (1, 2), "before": (1, 0), "after": (0, 2)}
    a = e.conv(x, e.w("f32[6,2,3,2]"), e.w("f32[6]"), **w, group=2, layout="NCHW")
    b = e.max_pool(x, kernel=(3, 3), **w, layout="NCHW")
    c = e.avg_pool(
        x,
        kernel=(2, 2),
        strides=(1, 1),
        dilations=(1, 1),
        before=(1, 0),
        after=(0, 1),
        count_include_pad=True,
        layout="NCHW",
    )
    d = e.conv_transpose(
        x,
        e.w("f32[4,3,3,2]"),
        strides=(2, 2),
        dilations=(1, 1),
        before=(1, 0),
        after=(0, 0),
        output_padding=(1, 0),
        group=2,
        layout="NCHW",
    )
    return a, b, c, d


def movement(e: Example) -> Any:
    x = e.x("f32[N,6,M]")
    n, _, m = x.shape
    return (
        e.reshape(x, shape=(n, 2, 3 * m)),
        e.reshape(x, shape=(n, 1, 6, m)),
        e.reshape(x, shape=(n * m, 6)),
        e.slice(x, starts=(0, 1, 0), sizes=(n, 2, m - 1), steps=(1, 2, 1)),
        e.slice(x, starts=(0, 5, m - 1), sizes=(n, 6, m), steps=(1, -1, -1)),
        e.expand(e.reshape(x, shape=(n, 6, m, 1)), shape=(n, 6, m, 2)),
        e.pad(x, before=(0, 1, 0), after=(1, 0, 2), mode="constant", value=2.5),
        e.pad(x, before=(0, 1, 2), after=(0, 0, 1), mode="reflect", value=0.0),
        e.concat(x, e.neg(x), axis=1),
        e.transpose(x, perm=(2, 0, 1)),
        e.iota(shape=(n, m), axis=1, dtype=DType.f32),
        e.dims(values=(n, 6, 2 * m + 1)),
        e.dims(values=(n, 6)),
    )


def divided(e: Example) -> Any:
    """Slices that are one Split, and some that are not."""
    x = e.x("f32[N,6]")
    n = x.shape[0]
    parts = [e.slice(x, starts=(0, s), sizes=(n, k), steps=(1, 1)) for s, k in ((3, 3), (0, 1), (1, 2))]
    return (*parts, e.slice(e.exp(x), starts=(0, 2), sizes=(n, 4), steps=(1, 1)))


def indexing(e: Example) -> Any:
    x, idx = e.x("f32[4,5]"), e.x("i64[2,3]")
    values, places = e.topk(x, axis=1, k=2, largest=True, sorted=True)
    return (
        e.gather(x, idx, axis=1),
        e.gather_elements(x, idx, axis=0),
        e.gather_nd(x, e.reshape(idx, shape=(3, 2)), batch_dims=0),
        e.scatter_elements(x, e.const(np.array([[0, 1]])), e.w("f32[1,2]"), axis=1, reduction="add"),
        e.scatter_nd(x, e.const(np.array([[0], [2]])), e.w("f32[2,5]"), reduction="none"),
        values,
        places,
        e.cumsum(x, axis=1, exclusive=True, reverse=True),
        e.argmax(x, axis=1, keepdims=False, select_last=False),
    )


def resized(e: Example) -> Any:
    x = e.x("f32[1,2,4,5]")
    common = {"nearest_mode": "floor", "cubic_coeff": -0.75, "exclude_outside": False, "extrapolation": 0.0}
    return (
        e.resize(
            x, mode="nearest", coordinate="asymmetric", sizes=(1, 2, 8, 10), scales=(1.0, 1.0, 2.0, 2.0), **common
        ),
        e.resize(x, mode="linear", coordinate="half_pixel", sizes=(1, 2, 7, 3), scales=(None,) * 4, **common),
        e.resize(x, mode="cubic", coordinate="align_corners", sizes=(1, 2, 9, 9), scales=(None,) * 4, **common),
    )


def norms(e: Example) -> Any:
    x = e.x("f32[N,5,8]")
    return (
        e.layer_norm(x, e.w("f32[8]"), e.w("f32[8]"), axis=2, epsilon=1e-5),
        e.layer_norm(x, axis=1, epsilon=1e-5),
        e.layer_norm(x, e.w("f32[1]"), axis=2, epsilon=1e-5),
        e.rms_norm(x, e.w("f32[8]"), axis=2, epsilon=1e-5),
        e.rms_norm(e.sin(x), axis=2, epsilon=1e-5),
        e.softmax(x, axis=1),
        e.log_softmax(x, axis=2),
        e.gelu(x, approximate="none"),
        e.gelu(x, approximate="tanh"),
        e.silu(x),
        e.hard_swish(x),
        e.log1p(e.abs(x)),
        e.expm1(x),
        e.leaky_relu(x, alpha=0.1),
        e.clip(x, min=-0.5, max=None),
        e.ne(x, e.const(np.float32(0))),
    )


def products(e: Example) -> Any:
    x, w = e.x("f32[N,4]"), e.w("f32[4,3]")
    y = e.x("f32[5,4]")
    return (
        e.add(e.matmul(x, w), e.w("f32[3]")),
        e.matmul(e.transpose(e.x("f32[4,N]"), perm=(1, 0)), w),
        e.matmul(x, e.transpose(y, perm=(1, 0))),
        e.add(e.matmul(e.x("f32[2,N,4]"), w), e.w("f32[3]")),
        e.matmul(x, e.x("f32[4]")),
    )


def attentions(e: Example) -> Any:
    q, k, v = e.x("f32[B,6,T,8]"), e.x("f32[B,2,M,8]"), e.x("f32[B,2,M,5]")
    b, t, m = q.shape[0], q.shape[2], k.shape[2]
    mask, keep = e.x("f32[B,1,T,M]"), e.gt(e.x("f32[T,M]"), -5.0)
    k6, v6 = (e.concat(x, x, x, axis=1) for x in (k, v))
    turned = e.transpose(e.x("f32[B,M,6,8]"), perm=(0, 2, 1, 3))
    plain = {"causal": False, "softcap": 0.0}
    assert b is not None and t is not None and m is not None
    return (
        e.attention(q, k, v, mask, scale=0.3, **plain),
        e.attention(q, k, v, keep, scale=1.0, **plain),
        e.attention(q, k6, v6, mask, scale=0.3, causal=False, softcap=5.0),
        e.attention(q, turned, v6, scale=0.3, **plain),
        e.attention(
            q,
            e.slice(k, starts=(0,) * 4, sizes=(b, 1, m, 8), steps=(1,) * 4),
            e.slice(v, starts=(0,) * 4, sizes=(b, 1, m, 5), steps=(1,) * 4),
            scale=0.5,
            **plain,
        ),
    )


def causal(e: Example) -> Any:
    q, k, v = e.x("f32[B,2,3,8]"), e.x("f32[B,2,M,8]"), e.x("f32[B,2,M,8]")
    return e.attention(q, k, v, scale=0.3, causal=True, softcap=0.0)


def recurrent(e: Example) -> Any:
    x = e.x("f32[T,N,3]")
    y, h, c = e.lstm(
        x, e.w("f32[2,16,3]"), e.w("f32[2,16,4]"), e.w("f32[2,32]"), direction="bidirectional", hidden=4, clip=None,
        layout=0, activations=("Sigmoid", "Tanh", "Tanh") * 2, input_forget=False,
    )  # fmt: skip
    z, g = e.gru(
        x, e.w("f32[1,12,3]"), e.w("f32[1,12,4]"), e.w("f32[1,24]"), direction="reverse", hidden=4, clip=None, layout=0,
        activations=("Sigmoid", "Tanh"), linear_before_reset=True,
    )  # fmt: skip
    return y, h, c, z, g


def integers(e: Example) -> Any:
    """Products of bytes with zero points, as quantized models hold them."""
    x, y = e.x("u8[1,3,6,6]"), e.x("i8[4,5]")
    w = e.const(e.random.integers(-100, 100, (4, 3, 3, 3)).astype(np.int32))
    bias = e.const(np.arange(4, dtype=np.int32))
    wide = e.sub(e.cast(x, to=DType.i32), e.const(np.int32(7)))
    window = {"strides": (1, 1), "dilations": (1, 1), "before": (0, 0), "after": (0, 0), "group": 1, "layout": "NCHW"}
    m = e.const(e.random.integers(0, 200, (5, 2)).astype(np.int32))
    return e.conv(wide, w, bias, **window), e.matmul(e.cast(y, to=DType.i32), m), e.matmul(e.x("i32[2,5]"), m)


def cropped(e: Example) -> Any:
    """Remainders of floats, and a transposed convolution whose crop is negative."""
    x = e.x("f32[1,2,4,4]")
    y = e.conv_transpose(
        x, e.w("f32[2,3,3,3]"), e.w("f32[3]"), strides=(2, 2), dilations=(1, 1), before=(-1, 1), after=(0, -2),
        output_padding=(0, 0), group=1, layout="NCHW",
    )  # fmt: skip
    return y, e.mod(x, e.const(np.float32(-0.75)), fmod=False), e.mod(x, e.const(np.float32(0.75)), fmod=True)


GRAPHS = [
    integers,
    cropped,
    windows,
    movement,
    divided,
    indexing,
    resized,
    norms,
    products,
    attentions,
    causal,
    recurrent,
]


@pytest.mark.parametrize("opset", [18, 20, 23])
@pytest.mark.parametrize("make", GRAPHS, ids=[m.__name__ for m in GRAPHS])
def test_families_at_each_opset(make: Callable[[Example], Any], opset: int) -> None:
    check(Example().graph(make), opset)


def test_pads_that_depend_on_sizes() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]> m (float[N,2,H,W] x) => (float a, float b, float c, float d) {
        w = Constant<value = float[3,2,1,1] {1, 2, 3, 4, 5, 6}>()
        a = Conv<auto_pad = "SAME_UPPER", strides = [2, 3]>(x, w)
        b = MaxPool<auto_pad = "SAME_LOWER", kernel_shape = [3, 2], strides = [2, 2]>(x)
        c = AveragePool<auto_pad = "SAME_UPPER", kernel_shape = [3, 2], strides = [2, 2]>(x)
        d = AveragePool<auto_pad = "SAME_LOWER", kernel_shape = [2, 4], strides = [2, 3], count_include_pad = 1>(x)
    }"""
    graph = import_model(onnx.parser.parse_model(text))
    for h, w in ((5, 8), (8, 7)):
        check(graph, sizes={"N": 2, "H": h, "W": w})


def test_sizes_of_zero_where_reshape_allows() -> None:
    graph = Example().graph(lambda e: e.relu(e.reshape(e.x("f32[N,6]"), shape=(e.inputs[0].shape[0], 2, 3))))
    check(graph, sizes={"N": 0})


def test_gemm_split_and_transposes_are_joined() -> None:
    counted = {n.op_type for n in check(Example().graph(products)).graph.node}
    assert "Gemm" in counted
    assert "Transpose" not in counted
    nodes = [n.op_type for n in check(Example().graph(divided)).graph.node]
    assert nodes.count("Split") == 1
    assert nodes.count("Slice") == 1


def test_round_trip_optimizes_to_the_same() -> None:
    for make in (norms, attentions, products, windows, divided):
        graph = optimize(Example().graph(make), Level.EXTENDED)
        back = optimize(import_model(export(graph)), Level.EXTENDED)
        assert sorted(n.op.name for n in back.nodes) == sorted(n.op.name for n in graph.nodes), print_graph(back)
        assert [v.type for v in back.outputs] == [v.type for v in graph.outputs]


def test_names_of_inputs_outputs_and_dims_are_kept() -> None:
    b = Builder()
    x = b.input("pixels:0", Type(DType.f32, (symbol("batch"), 2 * symbol("half") + 1)))
    graph = b.finish([b.relu(x), x, b.const(np.float32([1, 2]), name="fixed"), b.relu(x)])
    model = export(graph)
    assert [i.name for i in model.graph.input] == ["pixels:0"]
    assert [d.dim_param for d in model.graph.input[0].type.tensor_type.shape.dim] == ["batch", "2*half+1"]
    assert len({o.name for o in model.graph.output}) == 4
    onnx.checker.check_model(model)


def test_conditions_and_loops() -> None:
    branches = []
    for op in ("neg", "exp"):
        inner = Builder()
        x = inner.input("x", Type(DType.f32, (symbol("N"),)))
        branches.append(inner.finish([getattr(inner, op)(x), x]))
    b = Builder()
    cond, x = b.input("cond", Type(DType.bool, ())), b.input("x", Type(DType.f32, (symbol("N"),)))
    body = Builder()
    i, go = body.input("i", Type(DType.i64, ())), body.input("go", Type(DType.bool, ()))
    state, step = body.input("state", x.type), body.input("step", x.type)
    new = body.add(state, step)
    loop_body = body.finish([go, new, body.mul(new, body.cast(i, to=DType.f32))])
    y, z = b.if_(cond, x, then=branches[0], **{"else": branches[1]})
    total, steps = b.loop(b.const(np.int64(3)), None, z, x, body=loop_body, n_state=1, n_scan=1, length=3)
    graph = b.finish([y, total, steps])
    for seed in range(3):
        check(graph, seed=seed)


def test_kept_operators_are_written_as_they_were() -> None:
    node = onnx.helper.make_node("Compress", ["a", "keep"], ["out"], name="c", axis=0)
    source = onnx.helper.make_model(
        onnx.helper.make_graph(
            [node],
            "g",
            [
                onnx.helper.make_tensor_value_info("a", 1, ["N", 2]),
                onnx.helper.make_tensor_value_info("keep", 9, ["N"]),
            ],
            [onnx.helper.make_tensor_value_info("out", 1, None)],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 18)],
        ir_version=9,
    )
    model = export(import_model(source))
    assert [n.op_type for n in model.graph.node] == ["Compress"]
    a, keep = np.arange(6, dtype=np.float32).reshape(3, 2), np.array([True, False, True])
    np.testing.assert_array_equal(run(model, {"a": a, "keep": keep})[0], a[keep])


def test_channels_last_is_refused() -> None:
    graph = Example().graph(windows)
    with pytest.raises(UnsupportedError, match="layout NHWC"):
        export(optimize(graph, Level.LAYOUT))


def test_opsets_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match="opset 17"):
        export(Example().graph(norms), 17)
