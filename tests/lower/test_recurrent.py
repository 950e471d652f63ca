"""lstm, gru and rnn: every direction, layout and option against the meaning of the ops."""

from __future__ import annotations

import numpy as np
import pytest
from tests.lower.harness import HERE, check

from vivace.base.dims import Dim, symbol
from vivace.base.dtypes import DType
from vivace.graph.build import Builder
from vivace.graph.graph import Graph, Type, Value

GATES = {"lstm": 4, "gru": 3, "rnn": 1}
DEFAULT = {"lstm": ("Sigmoid", "Tanh", "Tanh"), "gru": ("Sigmoid", "Tanh"), "rnn": ("Tanh",)}
RNG = np.random.default_rng(5)


def weights(shape: tuple[int, ...], dtype: DType) -> np.ndarray:
    return (RNG.standard_normal(shape) * 0.4).astype(dtype.numpy)


def layer(
    name: str,
    n: Dim,
    t: Dim,
    size: int,
    hidden: int,
    direction: str = "forward",
    layout: int = 0,
    bias: bool = True,
    lengths: bool = False,
    states: bool = False,
    peepholes: bool = False,
    constant: bool = True,
    dtype: DType = DType.f32,
    **attrs: object,
) -> tuple[Graph, list[tuple[str, object]]]:
    """A graph with one layer, and what its inputs are to be: an array, or the shape of a random one."""
    dirs, gates = 2 if direction == "bidirectional" else 1, GATES[name]
    b = Builder()
    given: list[tuple[str, object]] = []

    def operand(key: str, shape: tuple[int, ...]) -> Value:
        data = weights(shape, dtype)
        if constant:
            return b.const(data, name=key)
        given.append((key, data))
        return b.input(key, Type(dtype, shape))

    x = b.input("x", Type(dtype, (n, t, size) if layout else (t, n, size)))
    given.append(("x", (n, t, size) if layout else (t, n, size)))
    state = (n, dirs, hidden) if layout else (dirs, n, hidden)
    ins: list[Value | None] = [
        x,
        operand("w", (dirs, gates * hidden, size)),
        operand("r", (dirs, gates * hidden, hidden)),
    ]
    ins.append(operand("b", (dirs, 2 * gates * hidden)) if bias else None)
    if lengths:
        given.append(("lens", (n,)))
    ins.append(b.input("lens", Type(DType.i32, (n,))) if lengths else None)
    for key in ("h0", "c0") if name == "lstm" else ("h0",):
        if states:
            given.append((key, state))
        ins.append(b.input(key, Type(dtype, state)) if states else None)
    if peepholes:
        ins.append(operand("p", (dirs, 3 * hidden)))
    base: dict[str, object] = {
        "direction": direction, "hidden": hidden, "layout": layout, "clip": None, "activations": DEFAULT[name] * dirs,
    }  # fmt: skip
    if name == "lstm":
        base["input_forget"] = False
    if name == "gru":
        base["linear_before_reset"] = False
    outs = getattr(b, name)(*ins, **{**base, **attrs})
    return b.finish(outs), given


def run(
    name: str, n: int, t: int, *args: object, symbolic: bool = False, isas: tuple = (None, HERE[-1]), **kw: object
) -> None:  # type: ignore[type-arg]
    dims = {"N": n, "T": t}
    graph, given = layer(name, symbol("N", 1) if symbolic else n, symbol("T", 0) if symbolic else t, *args, **kw)  # type: ignore[arg-type]
    dtype = graph.inputs[0].dtype
    arrays = {}
    for key, what in given:
        if isinstance(what, np.ndarray):
            arrays[key] = what
        elif key == "lens":
            arrays[key] = RNG.integers(0, t + 1, n).astype(np.int32)
        else:
            shape = [dims[str(d)] if not isinstance(d, int) else d for d in what]  # type: ignore[attr-defined]
            arrays[key] = RNG.standard_normal(shape).astype(dtype.numpy)
    tol = {DType.f16: 4e-3, DType.f64: 1e-6}.get(dtype, 2e-5)
    check(graph, *(arrays[v.name] for v in graph.inputs), isas=isas, tol=tol)


@pytest.mark.parametrize("name", list(GATES))
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("layout", [0, 1])
def test_directions_and_layouts(name: str, direction: str, layout: int) -> None:
    run(name, 2, 3, 5, 7, direction, layout)
    run(name, 3, 4, 5, 16, direction, layout, lengths=True, states=True)


@pytest.mark.parametrize("name", list(GATES))
@pytest.mark.parametrize("isa", HERE)
def test_sizes_that_fill_panels_and_sizes_that_do_not(name: str, isa: str) -> None:
    for hidden in (1, 15, 16, 48, 64):
        run(name, 1, 2, 3, hidden, isas=(isa,))


@pytest.mark.parametrize("name", list(GATES))
def test_symbolic_batch_and_length(name: str) -> None:
    for n, t in ((1, 1), (2, 5), (1, 0)):
        run(name, n, t, 4, 8, "bidirectional", symbolic=True, states=True, lengths=t > 0)


@pytest.mark.parametrize("name", list(GATES))
def test_weights_that_are_inputs(name: str) -> None:
    run(name, 2, 3, 5, 6, "bidirectional", constant=False)
    run(name, 2, 3, 5, 6, bias=False, constant=False, isas=(HERE[-1],))


@pytest.mark.parametrize(
    "options",
    [{"peepholes": True}, {"clip": 0.3}, {"input_forget": True}, {"peepholes": True, "clip": 0.2, "states": True}],
)
def test_lstm_options(options: dict[str, object]) -> None:
    run("lstm", 2, 3, 4, 6, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("bias", [True, False])
def test_gru_with_the_reset_gate_behind_the_product(bias: bool) -> None:
    run("gru", 2, 4, 3, 8, "bidirectional", bias=bias, linear_before_reset=True, states=True)


@pytest.mark.parametrize(
    "activation", ["Relu", "LeakyRelu", "ThresholdedRelu", "HardSigmoid", "Elu", "Softsign", "Softplus"]
)
def test_activations(activation: str) -> None:
    run("rnn", 1, 3, 4, 5, activations=(activation,))


def test_activations_that_differ_between_directions() -> None:
    run("rnn", 2, 3, 4, 5, "bidirectional", activations=("Relu", "Tanh"))
    run(
        "lstm",
        2,
        3,
        4,
        5,
        "bidirectional",
        activations=("Sigmoid", "Tanh", "Tanh", "HardSigmoid", "Softsign", "Tanh"),
        lengths=True,
    )


@pytest.mark.parametrize("dtype", [DType.f16, DType.f64])
def test_other_float_types(dtype: DType) -> None:
    run("lstm", 2, 3, 4, 5, dtype=dtype, states=True)
    run("gru", 2, 3, 4, 5, dtype=dtype)


def test_the_size_of_silero() -> None:
    run("lstm", 1, 4, 128, 128, states=True, isas=(HERE[-1],))


@pytest.mark.parametrize("name", list(GATES))
@pytest.mark.parametrize("isa", HERE)
def test_sequences_that_share_their_weights_and_those_that_are_left(name: str, isa: str) -> None:
    for n in (4, 9):
        run(name, n, 3, 5, 16, "bidirectional", states=True, isas=(None, isa))
        run(name, n, 2, 5, 7, symbolic=True, isas=(isa,))
    run(name, 6, 3, 5, 8, "reverse", lengths=True, isas=(isa,))
