"""Gates that reach the filters: where they do, what that saves, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from tests.lower.harness import BEST, check

from vivace.base.dims import symbol
from vivace.base.machine import ISAS, with_extras
from vivace.building import apply_precision
from vivace.graph.graph import Graph, Value
from vivace.graph.reference import evaluate
from vivace.graph.rewrite import Example, Log, rewrite
from vivace.loops.pack import Pack
from vivace.lower.lowering import lower
from vivace.lower.plan import steps_of
from vivace.optimize.rules.gates import gate_into_weights


@dataclass(frozen=True)
class Block:
    """An image times what comes of its own mean, and a convolution of it."""

    size: str = "2,6,7"
    channels: int = 19
    filters: int = 5
    gate: Callable[[Example, Value], Value] = lambda e, x: e.hard_sigmoid(x, alpha=0.2, beta=0.5)
    squeezed: tuple[int, ...] = (1, 2)
    kernel: int = 1
    stride: int = 1
    pad: int = 0
    weight: float = 1.0
    is_turned: bool = False
    is_read_once: bool = False
    is_read_again: bool = False

    def graph(self) -> Graph:
        return Example().graph(self.build)

    def build(self, e: Example) -> Value | tuple[Value, ...]:
        x, at = e.relu(e.x(f"f32[{self.size},{self.channels}]")), self.squeezed
        mean = e.reduce_mean(
            e.x(f"f32[{self.size},{self.channels}]") if self.is_read_once else x, axes=at, keepdims=True
        )
        gate = self.gate(e, e.mul(mean, 3.0))
        y = e.mul(gate, x) if self.is_turned else e.mul(x, gate)
        s, p = ((v, v) for v in (self.stride, self.pad))
        w = e.w(f"f32[{self.filters},{self.channels},{self.kernel},{self.kernel}]").data
        assert w is not None
        z = e.conv(
            y, e.const(w * np.float32(self.weight)), e.w(f"f32[{self.filters}]"), strides=s, dilations=(1, 1), before=p,
            after=p, group=1, layout="NHWC",
        )  # fmt: skip
        return (z, e.neg(y)) if self.is_read_again else z


YES = {
    "a gate per image": Block(),
    "one image": Block("1,6,7", 40, 16),
    "a gate for all images": Block(squeezed=(0, 1, 2)),
    "sigmoid": Block(gate=lambda e, x: e.sigmoid(x)),
    "turned": Block(is_turned=True),
    "open batch": Block("N,6,7"),
}
NO = {
    "too few pixels": Block("2,3,7"),
    "only shows at run time": Block("2,H,7"),
    "larger than 1": Block(gate=lambda e, x: e.exp(x)),
    "not finite": Block(weight=np.inf),
    "more than one pixel": Block(kernel=3),
    "leave some out": Block("2,9,12", stride=2),
    "pads": Block(pad=1),
    "one per image and channel": Block(squeezed=(1,)),
    "where the image is made": Block(is_read_once=True),
    "used elsewhere": Block(is_read_again=True),
}


def rewritten(graph: Graph) -> tuple[Graph, list[str]]:
    log = Log(explain=("gate_into_weights",))
    return rewrite(graph, [gate_into_weights], log), log.notes


def images(graph: Graph) -> list[np.ndarray]:
    shapes = [[d if isinstance(d, int) else 3 for d in v.shape] for v in graph.inputs]
    return [np.random.default_rng(5).standard_normal(s).astype(np.float32) for s in shapes]


@pytest.mark.parametrize("name", YES)
def test_computes_the_same(name: str) -> None:
    """f32 in two orders of two products: both are one rounding off."""
    graph = YES[name].graph()
    found, _ = rewritten(graph)
    assert [n.op.name for n in found.nodes if n.op.name in ("conv", "matmul")] == ["matmul"]
    x = images(graph)
    for want, got in zip(evaluate(graph, x), evaluate(found, x), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    if name == "open batch":
        check(found, *x)
        check(found, *(v[:0] for v in x))


@pytest.mark.parametrize("reason", NO)
def test_says_why_not(reason: str) -> None:
    graph = NO[reason].graph()
    found, notes = rewritten(graph)
    assert found is graph and any(reason in note for note in notes), notes


def test_infinities_and_nan_reach_the_same_sums() -> None:
    """A gate of 0 makes NaN of an infinite pixel, be it multiplied by the pixel or by the filters."""

    def build(e: Example) -> Value:
        x, g = e.x("f32[5,8,8,3]"), e.x("f32[5,1,1,3]")
        one, none = (1, 1), (0, 0)
        w = e.const(np.array([[1, -2, 3], [0, 1, -1], [3e38, 3e38, 3e38]], np.float32).reshape(3, 3, 1, 1))
        y = e.mul(x, e.sigmoid(g))
        z = e.conv(y, w, strides=one, dilations=one, before=none, after=none, group=1, layout="NHWC")
        return e.add(z, e.reduce_max(x, axes=(3,), keepdims=True))

    graph = Example().graph(build)
    found, _ = rewritten(graph)
    assert found is not graph
    x = np.random.default_rng(1).standard_normal((5, 8, 8, 3)).astype(np.float32) * 1e-3
    x[:, 0, 0, 0], x[:, 0, 1, 1], x[:, 0, 2, 2], x[:, 0, 3] = np.inf, -np.inf, np.nan, (np.inf, -np.inf, 0)
    gates = np.array([[-np.inf] * 3, [np.inf] * 3, [np.nan, 0, 1], [0, -np.inf, 5], [-20, -9, 0]], np.float32)
    feeds = [x, gates.reshape(5, 1, 1, 3)]
    with np.errstate(all="ignore"):
        (want,) = evaluate(graph, feeds)
        check(found, *feeds)
    (got,) = evaluate(found, feeds)
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_saves_a_pass_over_the_image(precision: str) -> None:
    """Bytes that all steps touch: without the pass, and with another over the filters. The rows of a narrow image meet
    one matrix together, so that bf16 finds rows enough to pack it."""
    block, isa = Block("2,8,8", 64, 16), ISAS[BEST]
    if precision == "bf16":
        isa = with_extras(isa, {"avx512_bf16"})
    moved, packs = [], []
    for graph in (block.graph(), rewritten(block.graph())[0]):
        plan = lower(apply_precision(graph, precision, isa)[0], isa)
        steps = steps_of(plan.body)
        moved.append(sum(int(s.bytes) for s in steps))  # type: ignore[call-overload]
        packs.append(sum(isinstance(s.spec, Pack) for s in steps))
    image, filters = 2 * 64 * 64, 64 * 16
    if precision == "f32":  # constant filters once for all images, each image's written and read
        assert moved[0] - moved[1] == 4 * (2 * image + filters - filters - 2 * 2 * filters)
    else:
        assert packs == [0, 1] and moved[1] < moved[0] - image


def test_open_sizes_keep_their_names() -> None:
    found, _ = rewritten(YES["open batch"].graph())
    assert found.outputs[0].shape == (symbol("N"), 6, 7, 5)
