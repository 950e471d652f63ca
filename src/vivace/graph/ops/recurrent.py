"""Recurrent layers in ONNX's layouts and gate orders (lstm: i o f c; gru: z r h).

lstm{direction, hidden, activations, clip, layout, input_forget}(x, w, r, b?, seq_lens?, h0?, c0?, p?) -> y, y_h, y_c
gru{direction, hidden, activations, clip, layout, linear_before_reset}(x, w, r, b?, seq_lens?, h0?) -> y, y_h
rnn{direction, hidden, activations, clip, layout}(x, w, r, b?, seq_lens?, h0?) -> y, y_h

layout 0: x [T,N,I], y [T,dirs,N,H], y_h [dirs,N,H]; layout 1: x [N,T,I], y [N,T,dirs,H], y_h [N,dirs,H], states
likewise.
w [dirs,gates*H,I], r [dirs,gates*H,H], b [dirs,2*gates*H] (input half, then recurrent half), p [dirs,3*H] in order i
o f.
direction forward|reverse|bidirectional; activations: names for each direction in turn; clip: float or None, applied
before activations.
Steps beyond a sequence's length give zeros in y and leave the state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vivace.base.dims import Dim
from vivace.base.errors import GraphError
from vivace.graph.graph import Attrs, Op, Type
from vivace.graph.ops.elementwise import _sigmoid
from vivace.graph.ops.reduction import accumulator
from vivace.graph.ops.shapes import need, same

Array = np.ndarray
Activation = Callable[[Array], Array]
ACTIVATIONS: dict[str, Activation] = {
    "Sigmoid": _sigmoid,
    "Tanh": np.tanh,
    "Relu": lambda x: np.maximum(x, 0),
    "LeakyRelu": lambda x: np.where(x < 0, 0.01 * x, x),
    "ThresholdedRelu": lambda x: np.where(x > 1, x, 0),
    "HardSigmoid": lambda x: np.clip(0.2 * x + 0.5, 0, 1),
    "Elu": lambda x: np.where(x < 0, np.expm1(np.minimum(x, 0)), x),
    "Softsign": lambda x: x / (1 + np.abs(x)),
    "Softplus": lambda x: np.logaddexp(x, 0),
}
_GATES = {"lstm": 4, "gru": 3, "rnn": 1}
_FUNCTIONS = {"lstm": 3, "gru": 2, "rnn": 1}


def _infer(name: str) -> Callable[[Sequence[Type | None], Attrs], tuple[Type, ...]]:
    def infer(types: Sequence[Type | None], attrs: Attrs) -> tuple[Type, ...]:
        x, *_ = (need(types, i, name) for i in range(3))
        hidden, gates = attrs["hidden"], _GATES[name]
        dirs = 2 if attrs["direction"] == "bidirectional" else 1
        if x.rank != 3:
            raise GraphError(f"the operand is {x}", where=name, expected="rank 3")
        if attrs["direction"] not in ("forward", "reverse", "bidirectional"):
            raise GraphError(f"the direction is {attrs['direction']!r}", where=name)
        if len(attrs["activations"]) != dirs * _FUNCTIONS[name] or any(
            a not in ACTIVATIONS for a in attrs["activations"]
        ):
            raise GraphError(
                f"activations are {attrs['activations']}",
                where=name,
                expected=f"{dirs * _FUNCTIONS[name]} of {', '.join(ACTIVATIONS)}",
            )
        y: tuple[Dim, ...]
        state: tuple[Dim, ...]
        if attrs["layout"]:
            n, t = x.shape[:2]
            y, state = (n, t, dirs, hidden), (n, dirs, hidden)
        else:
            t, n = x.shape[:2]
            y, state = (t, dirs, n, hidden), (dirs, n, hidden)
        wide = gates * hidden
        wanted = (
            (dirs, wide, x.shape[2]),
            (dirs, wide, hidden),
            (dirs, 2 * wide),
            (n,),
            state,
            state,
            (dirs, 3 * hidden),
        )
        for given, want in zip(types[1:], wanted):
            if given is not None and given.rank != len(want):
                raise GraphError(f"an operand is {given}", where=name, expected=f"rank {len(want)}")
            for got, size in zip(given.shape if given is not None else (), want):
                same(got, size, name)
        states = (Type(x.dtype, state),) * (2 if name == "lstm" else 1)
        return (Type(x.dtype, y), *states)

    return infer


Step = Callable[[Array, Array, Array | None], tuple[Array, Array | None]]


def _clipper(clip: float | None) -> Activation:
    return (lambda x: x) if clip is None else (lambda x: np.clip(x, -clip, clip))


def _lstm_step(r: Array, b: Array, p: Array | None, f: Sequence[Activation], attrs: Attrs) -> Step:
    hidden, clip = attrs["hidden"], _clipper(attrs["clip"])
    pi, po, pf = np.split(p, 3) if p is not None else (0.0, 0.0, 0.0)

    def step(xw: Array, h: Array, c: Array | None) -> tuple[Array, Array | None]:
        assert c is not None
        i, o, fg, g = np.split(xw + h @ r.T + b[: 4 * hidden] + b[4 * hidden :], 4, axis=-1)
        i = f[0](clip(i + pi * c))
        fg = 1 - i if attrs["input_forget"] else f[0](clip(fg + pf * c))
        c = fg * c + i * f[1](clip(g))
        return f[0](clip(o + po * c)) * f[2](c), c

    return step


def _gru_step(r: Array, b: Array, p: Array | None, f: Sequence[Activation], attrs: Attrs) -> Step:
    hidden, clip = attrs["hidden"], _clipper(attrs["clip"])
    wb, rb = b[: 3 * hidden], b[3 * hidden :]

    def step(xw: Array, h: Array, c: Array | None) -> tuple[Array, Array | None]:
        xz, xr, xh = np.split(xw + wb, 3, axis=-1)
        rz, rr, rh = np.split(r, 3)
        bz, br, bh = np.split(rb, 3)
        z, reset = f[0](clip(xz + h @ rz.T + bz)), f[0](clip(xr + h @ rr.T + br))
        inner = reset * (h @ rh.T + bh) if attrs["linear_before_reset"] else (reset * h) @ rh.T + bh
        return (1 - z) * f[1](clip(xh + inner)) + z * h, None

    return step


def _rnn_step(r: Array, b: Array, p: Array | None, f: Sequence[Activation], attrs: Attrs) -> Step:
    hidden, clip = attrs["hidden"], _clipper(attrs["clip"])
    return lambda xw, h, c: (f[0](clip(xw + h @ r.T + b[:hidden] + b[hidden:])), None)


_STEP = {"lstm": _lstm_step, "gru": _gru_step, "rnn": _rnn_step}


def _run(name: str) -> Callable[[Sequence[Array | None], Attrs], tuple[Array, ...]]:
    def run(xs: Sequence[Array | None], attrs: Attrs) -> tuple[Array, ...]:
        given: list[Array | None] = [*xs, *[None] * (8 - len(xs))]
        x, w, r, b, lens, h0, c0, p = given
        assert x is not None and w is not None and r is not None
        dtype, wide = x.dtype, accumulator(x.dtype)
        x, w, r = (a.astype(wide, copy=False) for a in (x, w, r))
        if attrs["layout"]:
            x, h0, c0 = x.swapaxes(0, 1), *(None if s is None else s.swapaxes(0, 1) for s in (h0, c0))
        steps, n, hidden, dirs = x.shape[0], x.shape[1], attrs["hidden"], w.shape[0]
        b = np.zeros((dirs, 2 * _GATES[name] * hidden), wide) if b is None else b.astype(wide, copy=False)
        y, h_last, c_last = (
            np.zeros((steps, dirs, n, hidden), wide),
            np.zeros((dirs, n, hidden), wide),
            np.zeros((dirs, n, hidden), wide),
        )
        each = _FUNCTIONS[name]
        for d in range(dirs):
            f = [ACTIVATIONS[a] for a in attrs["activations"][d * each : (d + 1) * each]]
            step = _STEP[name](r[d], b[d], None if p is None else p[d].astype(wide), f, attrs)
            h = np.zeros((n, hidden), wide) if h0 is None else h0[d].astype(wide)
            c = np.zeros((n, hidden), wide) if c0 is None else c0[d].astype(wide)
            xw = x @ w[d].T
            backwards = attrs["direction"] == "reverse" or d == 1
            with np.errstate(all="ignore"):
                for t in reversed(range(steps)) if backwards else range(steps):
                    h_next, c_next = step(xw[t], h, c)
                    live = np.ones((n, 1), bool) if lens is None else (t < lens)[:, None]
                    h = np.where(live, h_next, h).astype(wide)
                    c = c if c_next is None else np.where(live, c_next, c).astype(wide)
                    y[t, d] = np.where(live, h_next, 0)
            h_last[d], c_last[d] = h, c
        outs = [y, h_last, c_last] if name == "lstm" else [y, h_last]
        if attrs["layout"]:
            outs = [y.transpose(2, 0, 1, 3), *(s.swapaxes(0, 1) for s in outs[1:])]
        return tuple(np.ascontiguousarray(o).astype(dtype, copy=False) for o in outs)

    return run


def _flops(name: str) -> Callable[[Sequence[Type | None], Sequence[Type], Attrs], Dim]:
    def flops(ins: Sequence[Type | None], outs: Sequence[Type], attrs: Attrs) -> Dim:
        x = ins[0]
        assert x is not None
        return 2 * outs[0].size * _GATES[name] * (x.shape[2] + attrs["hidden"]) + outs[0].size * _GATES[name] * 12

    return flops


FAMILY = tuple(Op(name, _infer(name), _run(name), _flops(name), False, 2e-6, "contraction") for name in _GATES)
