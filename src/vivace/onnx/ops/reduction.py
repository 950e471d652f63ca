"""Reductions: Reduce*, ArgMax, ArgMin, and the global pools."""

from __future__ import annotations

from collections.abc import Callable

from vivace.graph.graph import Value
from vivace.onnx.call import Call, onnx_op

Reduce = Callable[[Call, Value, tuple[int, ...], bool], Value]


def _core(name: str) -> Reduce:
    return lambda c, x, axes, keep: getattr(c, name)(x, axes=axes, keepdims=keep) if axes else x


_sum = _core("reduce_sum")


def _log_sum_exp(c: Call, x: Value, axes: tuple[int, ...], keep: bool) -> Value:
    """max + log(sum(exp(x - max))), with an infinite max left out of the shift."""
    top = c.reduce_max(x, axes=axes, keepdims=True) if axes else x
    top = c.where(c.isinf(top), c.like(x, 0), top)
    out = c.add(c.log(_sum(c, c.exp(c.sub(x, top)), axes, True)), top)
    return out if keep else c.reshaped(out, [d for i, d in enumerate(x.shape) if i not in axes])


REDUCTIONS: dict[str, Reduce] = {
    "ReduceSum": _sum,
    "ReduceMean": _core("reduce_mean"),
    "ReduceMax": _core("reduce_max"),
    "ReduceMin": _core("reduce_min"),
    "ReduceProd": _core("reduce_prod"),
    "ReduceL1": lambda c, x, axes, keep: _sum(c, c.abs(x), axes, keep),
    "ReduceL2": lambda c, x, axes, keep: c.sqrt(_sum(c, c.mul(x, x), axes, keep)),
    "ReduceSumSquare": lambda c, x, axes, keep: _sum(c, c.mul(x, x), axes, keep),
    "ReduceLogSum": lambda c, x, axes, keep: c.log(_sum(c, x, axes, keep)),
    "ReduceLogSumExp": _log_sum_exp,
}


def _attribute(fn: Reduce) -> Callable[[Call, Value], Value]:
    def run(c: Call, x: Value) -> Value:
        axes = c.attr("axes", tuple(range(x.rank)))
        return fn(c, x, c.axes(axes, x.rank), bool(c.attr("keepdims", 1)))

    return run


def _input(fn: Reduce) -> Callable[..., Value]:
    def run(c: Call, x: Value, axes: Value | None = None) -> Value:
        given = () if axes is None else c.static_ints(axes, "axes")
        if not given and not c.attr("noop_with_empty_axes", 0):
            given = tuple(range(x.rank))
        return fn(c, x, c.axes(given, x.rank), bool(c.attr("keepdims", 1)))

    return run


for _name, _fn in REDUCTIONS.items():
    onnx_op(_name)(_attribute(_fn))
    onnx_op(_name, since=13 if _name == "ReduceSum" else 18)(_input(_fn))


@onnx_op("ArgMax", "ArgMin")
def arg(c: Call, x: Value) -> Value:
    core = c.argmax if c.op_type == "ArgMax" else c.argmin
    return core(
        x,
        axis=c.axis(c.attr("axis", 0), x.rank),
        keepdims=bool(c.attr("keepdims", 1)),
        select_last=bool(c.attr("select_last_index", 0)),
    )


def _spatial(x: Value) -> tuple[int, ...]:
    return tuple(range(2, x.rank))


@onnx_op("GlobalAveragePool")
def global_average_pool(c: Call, x: Value) -> Value:
    return REDUCTIONS["ReduceMean"](c, x, _spatial(x), True)


@onnx_op("GlobalMaxPool")
def global_max_pool(c: Call, x: Value) -> Value:
    return REDUCTIONS["ReduceMax"](c, x, _spatial(x), True)


@onnx_op("GlobalLpPool")
def global_lp_pool(c: Call, x: Value) -> Value:
    p = c.attr("p", 2)
    if p in (1, 2):
        return REDUCTIONS[f"ReduceL{p}"](c, x, _spatial(x), True)
    powered = _sum(c, c.pow(c.abs(x), c.like(x, p)), _spatial(x), True)
    return c.pow(powered, c.like(x, 1 / p))
