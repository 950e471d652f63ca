"""Indexing, reductions, normalizations, attention, resampling, recurrence, control flow: against other definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vivace.base.dims import symbol
from vivace.base.dtypes import DType
from vivace.base.errors import GraphError, UnsupportedError
from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Type
from vivace.graph.ops import OPS
from vivace.graph.ops.shapes import DimMismatch
from vivace.graph.reference import evaluate
from vivace.graph.verify import verify

RNG = np.random.default_rng(11)
Array = np.ndarray


def f32(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def run(name: str, *arrays: Array | None, **attrs: object) -> tuple[Array, ...]:
    """Evaluate, holding the results to the inferred types."""
    types = OPS[name].infer([None if a is None else Type(DType.of(a.dtype), a.shape) for a in arrays], attrs)
    outs = OPS[name].evaluate(list(arrays), attrs)
    assert tuple(Type(DType.of(o.dtype), o.shape) for o in outs) == types
    return outs


class TestIndexing:
    def test_gather_wraps_and_checks(self) -> None:
        x = f32(3, 4)
        np.testing.assert_array_equal(run("gather", x, np.array([[-1, 0]]), axis=1)[0], x[:, [[3, 0]]])
        with pytest.raises(GraphError, match="outside"):
            run("gather", x, np.array([4]), axis=1)
        with pytest.raises(GraphError, match="i32 or i64"):
            run("gather", x, np.array([1.0]), axis=1)

    def test_gather_elements_undoes_a_sort(self) -> None:
        x = f32(3, 5)
        order = np.argsort(x, axis=1)
        np.testing.assert_array_equal(run("gather_elements", x, order, axis=1)[0], np.sort(x, axis=1))

    def test_gather_nd_with_batch(self) -> None:
        x, idx = f32(2, 3, 4), np.array([[[1, -1]], [[0, 2]]])
        np.testing.assert_array_equal(run("gather_nd", x, idx, batch_dims=1)[0], [[x[0, 1, 3]], [x[1, 0, 2]]])

    @pytest.mark.parametrize("reduction", ["none", "add", "mul", "max", "min"])
    def test_scatter(self, reduction: str) -> None:
        x, idx, u = f32(4), np.array([1, -1, 1]), f32(3)
        want = x.copy()
        for i, v in zip(idx, u):
            old = want[i]
            want[i] = {"none": v, "add": old + v, "mul": old * v, "max": max(old, v), "min": min(old, v)}[reduction]
        np.testing.assert_allclose(run("scatter_elements", x, idx, u, axis=0, reduction=reduction)[0], want, rtol=1e-6)
        np.testing.assert_allclose(run("scatter_nd", x, idx[:, None], u, reduction=reduction)[0], want, rtol=1e-6)

    @pytest.mark.parametrize("largest", [True, False])
    def test_topk_takes_the_first_of_equals(self, largest: bool) -> None:
        x = np.float32([[1, 3, 3, 2, 1]])
        values, idx = run("topk", x, axis=1, k=4, largest=largest, sorted=True)
        np.testing.assert_array_equal(values, [[3, 3, 2, 1]] if largest else [[1, 1, 2, 3]])
        np.testing.assert_array_equal(idx, [[1, 2, 3, 0]] if largest else [[0, 4, 3, 1]])


class TestReductions:
    @pytest.mark.parametrize("keepdims", [True, False])
    @pytest.mark.parametrize("name", ["sum", "max", "min", "prod", "mean"])
    def test_against_numpy(self, name: str, keepdims: bool) -> None:
        x = f32(2, 3, 4)
        want = getattr(np, name)(x, axis=(0, 2), keepdims=keepdims)
        np.testing.assert_allclose(run(f"reduce_{name}", x, axes=(0, 2), keepdims=keepdims)[0], want, rtol=1e-5)

    def test_nothing_to_reduce(self) -> None:
        x = np.zeros((0, 2), np.float32)
        for name, want in (("sum", 0), ("prod", 1), ("max", -np.inf), ("min", np.inf), ("mean", np.nan)):
            np.testing.assert_array_equal(run(f"reduce_{name}", x, axes=(0,), keepdims=False)[0], [want, want])

    def test_arguments_of_extremes(self) -> None:
        x = np.float32([[2, 5, 5], [1, 0, 0]])
        assert run("argmax", x, axis=1, keepdims=False, select_last=False)[0].tolist() == [1, 0]
        assert run("argmax", x, axis=1, keepdims=True, select_last=True)[0].tolist() == [[2], [0]]
        assert run("argmin", x, axis=1, keepdims=False, select_last=True)[0].tolist() == [0, 2]

    def test_running_sums(self) -> None:
        x = np.array([1, 2, 3, 4], np.int64)
        for exclusive, reverse, want in (
            (False, False, [1, 3, 6, 10]),
            (True, False, [0, 1, 3, 6]),
            (False, True, [10, 9, 7, 4]),
            (True, True, [9, 7, 4, 0]),
        ):
            assert run("cumsum", x, axis=0, exclusive=exclusive, reverse=reverse)[0].tolist() == want


class TestNormalizations:
    def test_softmax_is_stable(self) -> None:
        x = np.float32([[1000, 1000, -1000], [-np.inf, 0, -np.inf]])
        np.testing.assert_array_equal(run("softmax", x, axis=1)[0], [[0.5, 0.5, 0], [0, 1, 0]])
        assert np.isnan(run("softmax", np.full((1, 2), -np.inf, np.float32), axis=1)[0]).all()
        np.testing.assert_allclose(run("log_softmax", x[:1], axis=1)[0], [[-math.log(2)] * 2 + [-2000 - math.log(2)]])

    def test_layer_norm_over_two_axes(self) -> None:
        x, scale, bias = f32(2, 3, 4), f32(3, 4), f32(4)
        want = (x - x.mean((1, 2), keepdims=True)) / np.sqrt(x.var((1, 2), keepdims=True) + 1e-5) * scale + bias
        np.testing.assert_allclose(
            run("layer_norm", x, scale, bias, axis=1, epsilon=1e-5)[0], want, rtol=1e-5, atol=1e-5
        )
        with pytest.raises((GraphError, DimMismatch)):
            run("layer_norm", x, f32(2, 3, 4), axis=1, epsilon=1e-5)

    def test_rms_norm(self) -> None:
        x, scale = f32(2, 6), f32(6)
        want = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-6) * scale
        np.testing.assert_allclose(run("rms_norm", x, scale, axis=1, epsilon=1e-6)[0], want, rtol=1e-5)


class TestAttention:
    def test_against_loops(self) -> None:
        q, k, v = f32(1, 4, 3, 8), f32(1, 2, 5, 8), f32(1, 2, 5, 6)
        mask = RNG.random((1, 1, 3, 5)) < 0.6
        mask[..., 0] = True
        (got,) = run("attention", q, k, v, mask, scale=0.3, causal=True, softcap=2.0)
        for h in range(4):
            for i in range(3):
                seen = [j for j in range(5) if j <= i + 2 and mask[0, 0, i, j]]
                scores = [2 * math.tanh(float(q[0, h, i] @ k[0, h // 2, j]) * 0.3 / 2) for j in seen]
                p = np.exp(np.array(scores) - max(scores))
                want = (p / p.sum()) @ np.stack([v[0, h // 2, j] for j in seen])
                np.testing.assert_allclose(got[0, h, i], want, rtol=1e-4, atol=1e-5)

    def test_an_added_mask_and_a_blind_row(self) -> None:
        q, k, v = f32(1, 1, 2, 4), f32(1, 1, 3, 4), f32(1, 1, 3, 4)
        bias = np.float32([[0, -np.inf, -np.inf], [-np.inf] * 3])
        (got,) = run("attention", q, k, v, bias, scale=1.0, causal=False, softcap=0.0)
        np.testing.assert_array_equal(got[0, 0, 0], v[0, 0, 0])
        assert np.isnan(got[0, 0, 1]).all()

    def test_heads_must_fit(self) -> None:
        with pytest.raises(GraphError, match="multiple"):
            run("attention", f32(1, 3, 2, 4), f32(1, 2, 2, 4), f32(1, 2, 2, 4), scale=1.0, causal=False, softcap=0.0)


# Of the cubic kernels, only that with -0.5 keeps straight lines straight.
STYLE = {"nearest_mode": "floor", "cubic_coeff": -0.5, "exclude_outside": False}


class TestResampling:
    def test_nearest_doubles(self) -> None:
        (got,) = run(
            "resize",
            f32(1, 2),
            mode="nearest",
            coordinate="asymmetric",
            sizes=(1, 4),
            scales=(None, None),
            **STYLE,
        )
        assert got[0, 0] == got[0, 1] and got[0, 2] == got[0, 3]

    @pytest.mark.parametrize("mode", ["linear", "cubic"])
    @pytest.mark.parametrize("coordinate", ["half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel"])
    def test_inside_a_line_stays_a_line(self, mode: str, coordinate: str) -> None:
        x = np.arange(12, dtype=np.float32)
        (got,) = run("resize", x, mode=mode, coordinate=coordinate, sizes=(30,), scales=(None,), **STYLE)
        steps = np.diff(got[8:-8])
        np.testing.assert_allclose(steps, steps[0], rtol=1e-4)

    def test_an_empty_axis(self) -> None:
        x = np.zeros((0, 3), np.float32)
        (got,) = run("resize", x, mode="linear", coordinate="half_pixel", sizes=(0, 6), scales=(None, None), **STYLE)
        assert got.shape == (0, 6)


class TestRecurrence:
    @pytest.mark.parametrize("name", ["lstm", "gru", "rnn"])
    def test_directions_and_layouts_are_consistent(self, name: str) -> None:
        gates, t, n, i, h = {"lstm": 4, "gru": 3, "rnn": 1}[name], 5, 2, 3, 4
        names = {"lstm": ("Sigmoid", "Tanh", "Tanh"), "gru": ("Sigmoid", "Tanh"), "rnn": ("Tanh",)}[name]
        extra = {"lstm": {"input_forget": False}, "gru": {"linear_before_reset": True}, "rnn": {}}[name]
        x, w, r, b = f32(t, n, i), f32(2, gates * h, i), f32(2, gates * h, h), f32(2, 2 * gates * h)
        common = {"hidden": h, "clip": None, "layout": 0} | extra
        both = run(name, x, w, r, b, direction="bidirectional", activations=names * 2, **common)
        forward = run(name, x, w[:1], r[:1], b[:1], direction="forward", activations=names, **common)
        back = run(name, x[::-1], w[1:], r[1:], b[1:], direction="forward", activations=names, **common)
        np.testing.assert_array_equal(both[0][:, 0], forward[0][:, 0])
        np.testing.assert_array_equal(both[0][::-1, 1], back[0][:, 0])
        np.testing.assert_array_equal(both[1][0], forward[0][-1, 0])
        turned = run(
            name, x.swapaxes(0, 1), w, r, b, direction="bidirectional", activations=names * 2, **common | {"layout": 1}
        )
        np.testing.assert_array_equal(turned[0], both[0].transpose(2, 0, 1, 3))
        np.testing.assert_array_equal(turned[1], both[1].swapaxes(0, 1))

    def test_short_sequences_stop(self) -> None:
        x, w, r = f32(4, 2, 3), f32(1, 8, 3), f32(1, 8, 2)
        attrs = {
            "direction": "forward",
            "hidden": 2,
            "activations": ("Sigmoid", "Tanh", "Tanh"),
            "clip": None,
            "layout": 0,
        }
        lens = np.array([2, 4], np.int32)
        y, last, _ = run("lstm", x, w, r, None, lens, input_forget=False, **attrs)
        assert not y[2:, 0, 0].any()
        np.testing.assert_array_equal(last[0, 0], y[1, 0, 0])
        np.testing.assert_array_equal(last[0, 1], y[3, 0, 1])


def _branch(op: str) -> Graph:
    b = Builder()
    x = b.input("x", Type(DType.f32, (symbol("n"),)))
    return b.finish([getattr(b, op)(x)])


class TestControl:
    def test_if_runs_one_branch(self) -> None:
        b = Builder()
        c, x = b.input("c", Type(DType.bool, ())), b.input("x", Type(DType.f32, (symbol("n"),)))
        y = b.if_(c, x, **{"then": _branch("neg"), "else": _branch("abs")})
        g = b.finish([y])
        verify(g)
        for flag, want in ((True, [1, -2]), (False, [1, 2])):
            np.testing.assert_array_equal(evaluate(g, [np.array(flag), np.float32([-1, 2])])[0], want)

    def test_branches_must_agree(self) -> None:
        b = Builder()
        c, x = b.input("c", Type(DType.bool, ())), b.input("x", Type(DType.f32, (symbol("n"),)))
        with pytest.raises(GraphError, match="types are"):
            b.if_(c, x, **{"then": _branch("neg"), "else": _branch("isnan")})

    def test_a_provider_is_needed_for_foreign_operators(self) -> None:
        attrs = {"types": (Type(DType.f32, (1,)),), "name": "odd", "reason": "it is odd"}
        with pytest.raises(UnsupportedError, match=r"odd.*another provider"):
            OPS["onnx"].evaluate([f32(1)], attrs)


@pytest.mark.parametrize(
    ("start", "size", "step"), [(0, 6, 1), (5, 1, 1), (-1, 2, 1), (1, 3, 2), (1, 3, -1), (0, -1, 1)]
)
def test_slices_stay_inside(start: int, size: int, step: int) -> None:
    with pytest.raises(GraphError, match="are not in"):
        OPS["slice"].infer([Type(DType.f32, (5,))], {"starts": (start,), "sizes": (size,), "steps": (step,)})
    n = symbol("N")
    for most in (n, n + size):  # which may be long enough
        OPS["slice"].infer([Type(DType.f32, (most,))], {"starts": (0,), "sizes": (3,), "steps": (1,)})
