"""LSTM, GRU and RNN."""

from __future__ import annotations

from typing import Any

from vivace.graph.graph import Value
from vivace.graph.ops.recurrent import ACTIVATIONS
from vivace.onnx.call import Call, Result, onnx_op
from vivace.onnx.scope import Fallback

_DEFAULTS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}
_SPELLING = {name.lower(): name for name in ACTIVATIONS}
# The parameters that ONNX gives each activation unless told; only these are built into the core op.
_PARAMETERS = {"LeakyRelu": (0.01,), "ThresholdedRelu": (1.0,), "HardSigmoid": (0.2, 0.5), "Elu": (1.0,)}


def _attributes(c: Call) -> dict[str, Any]:
    direction = c.attr("direction", "forward")
    dirs = 2 if direction == "bidirectional" else 1
    wanted = c.attr("activations", _DEFAULTS[c.op_type] * dirs)
    names = tuple(_SPELLING.get(a.lower(), a) for a in wanted)
    if any(a not in ACTIVATIONS for a in names):
        raise Fallback(f"its activations are {', '.join(wanted)}")
    alphas, betas = list(c.attr("activation_alpha", ())), list(c.attr("activation_beta", ()))
    if alphas or betas:
        parameters = [_PARAMETERS.get(a, ()) for a in names]
        usual = ([p[0] for p in parameters if p], [p[1] for p in parameters if len(p) > 1])
        if any(abs(x - y) > 1e-6 for given, want in zip((alphas, betas), usual) for x, y in zip(given, want)):
            raise Fallback("its activations have parameters of their own")
    clip = c.attr("clip", 0.0)
    return {"direction": direction, "activations": names, "clip": clip or None, "layout": c.attr("layout", 0)}


def _hidden(c: Call, r: Value) -> int:
    hidden = r.shape[-1]
    if not isinstance(hidden, int):
        raise Fallback("its hidden size depends on the sizes of inputs")
    if c.attr("hidden_size", hidden) != hidden:
        raise c.error(f"hidden_size is {c.attr('hidden_size')}", f"{hidden}, as in {r.type}")
    return hidden


@onnx_op("LSTM")
def lstm(
    c: Call,
    x: Value,
    w: Value,
    r: Value,
    b: Value | None = None,
    lens: Value | None = None,
    h0: Value | None = None,
    c0: Value | None = None,
    p: Value | None = None,
) -> Result:
    outs = c.lstm(
        x,
        w,
        r,
        b,
        lens,
        h0,
        c0,
        p,
        hidden=_hidden(c, r),
        input_forget=bool(c.attr("input_forget", 0)),
        **_attributes(c),
    )
    return tuple(outs[: c.n_outputs])


@onnx_op("GRU")
def gru(
    c: Call, x: Value, w: Value, r: Value, b: Value | None = None, lens: Value | None = None, h0: Value | None = None
) -> Result:
    outs = c.gru(
        x,
        w,
        r,
        b,
        lens,
        h0,
        hidden=_hidden(c, r),
        linear_before_reset=bool(c.attr("linear_before_reset", 0)),
        **_attributes(c),
    )
    return tuple(outs[: c.n_outputs])


@onnx_op("RNN")
def rnn(
    c: Call, x: Value, w: Value, r: Value, b: Value | None = None, lens: Value | None = None, h0: Value | None = None
) -> Result:
    return tuple(c.rnn(x, w, r, b, lens, h0, hidden=_hidden(c, r), **_attributes(c))[: c.n_outputs])
