"""Products of bytes: `conv_integer` and `matmul_integer` as contractions that sum in i32.

What zero points add to a sum is constant per column, so it is part of the bias:

    sum((x - zero) * w) + bias = sum((x + offset) * w) + bias - (zero + offset) * sum(w)

`offset` is what the instruction set wants added to i8 (`lower/arithmetic.py`). A zero point that is only known at run
time (dynamic quantization) is multiplied with the column sums in the epilogue. Padding was split off before and holds
the zero point (`prepare`).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vivace.base.dims import Dim, prod, symbol
from vivace.base.dtypes import DType
from vivace.graph.graph import Value
from vivace.loops.contraction import Axis, Contraction, Depthwise, Packing, contraction_params
from vivace.loops.kernel import Binary, Buffer, Cast, Expr, Read
from vivace.lower.arithmetic import activation_offset, arithmetic_of, depthwise_offset
from vivace.lower.choices import Site
from vivace.lower.group import Group
from vivace.lower.lowering import Lowering
from vivace.lower.pack import contiguous_run, pack_groups
from vivace.lower.rules.channels_last import dense_channels, dense_results, own_index, to_last
from vivace.lower.rules.contraction import emit_contraction
from vivace.lower.rules.elementwise import Params
from vivace.lower.rules.epilogue import Epilogue, tail_flops
from vivace.lower.rules.floats import byte_site, lower_in_floats
from vivace.lower.rules.half_products import unpacked
from vivace.lower.tile import panel_lanes
from vivace.lower.views import View

Array = np.ndarray
ACC = Read("acc", DType.i32)
_WEIGHTS = Buffer("b", DType.i8, (0,), (1,))  # stands for the packed ones, whose layout the contraction decides


def _operand(g: Group, i: int) -> Value | None:
    return g.anchor.inputs[i] if len(g.anchor.inputs) > i else None


def _sums(w: Value, axes: tuple[int, ...]) -> Array:
    """Sums of the weights that belong to one result."""
    assert w.data is not None
    return w.data.astype(np.int64).sum(axis=axes)


class _Start:
    """What is added to the integer sums: a constant per column, and the product of a zero point that is only known at
    run time."""

    def __init__(self, ctx: Lowering, g: Group, w: Value, sums: Array, offset: int) -> None:
        zero, bias = _operand(g, 2), _operand(g, 3)
        assert zero is not None
        self.zero: View | None = None
        known = 0
        if zero.data is not None:
            known = int(zero.data.reshape(-1)[0])
        else:
            self.zero = ctx.view(zero)
        total = -(known + offset) * sums
        self.bias: View | None = None
        if bias is not None and bias.data is None:
            self.bias = ctx.view(bias)
        elif bias is not None and bias.data is not None:
            total = total + bias.data
        narrow = total.astype(np.int64).astype(np.int32)  # wraps, as the sums do
        name = g.anchor.outputs[0].name
        self.total = ctx.constant(narrow, f"{name}_start", ("start", name, narrow.tobytes()))
        columns = sums.astype(np.int32)
        self.sums = ctx.constant(columns, f"{name}_sums", ("sums", name, columns.tobytes())) if self.zero else None

    def expr(self, params: Params, shape: tuple[Dim, ...], index: tuple[Dim, ...], axis: int) -> Expr:
        """acc with everything added; columns run along `axis` of the result."""

        def load(v: View) -> Expr:
            size = v.shape
            spread = replace(
                v, shape=(*size, *(1,) * (len(shape) - 1 - axis)), strides=(*v.strides, *(0,) * (len(shape) - 1 - axis))
            )
            return params.load((spread if size else v).expand(shape), index)

        total: Expr = Binary("add", ACC, load(self.total))
        if self.bias is not None:
            total = Binary("add", total, load(self.bias))
        if self.zero is not None and self.sums is not None:
            total = Binary("sub", total, Binary("mul", Cast(DType.i32, load(self.zero)), load(self.sums)))
        return total


def _packed(ctx: Lowering, w: Value, c: Contraction, matrix: Array) -> tuple[View, Packing]:
    """The weights [batch, k, n] in the panels of the contraction's arithmetic."""
    arithmetic = arithmetic_of(c, ctx.isa)
    chosen = ctx.choices.of(unpacked(c, DType.i8)).lanes
    lanes, group, run = panel_lanes(c.n, ctx.isa, arithmetic, chosen), arithmetic.group, contiguous_run(c)
    assert w.data is not None
    how = ("bytes", lanes, group, run, matrix.shape)
    b = ctx.made_of((w.data,), how, f"{w.name}_panels", lambda: pack_groups(matrix, lanes, group, run))
    return b, Packing("panels", lanes)


def lower_matmul_integer(ctx: Lowering, g: Group) -> None:
    """Rows of bytes against a constant i8 matrix."""
    a_value, w_value = _operand(g, 0), _operand(g, 1)
    assert a_value is not None and w_value is not None and w_value.data is not None
    y = g.anchor.outputs[0]
    a = ctx.view(a_value)
    k, n = w_value.data.shape
    if a.strides[-1] != 1 and k != 1:
        a = ctx.contiguous(a, f"{a_value.name}_rows")
    elif a.strides[-1] != 1:
        a = replace(a, strides=(*a.strides[:-1], 1))
    target = ctx.target(g.output)
    out = target
    if out.strides[-1] != 1 and n != 1:
        out = ctx.temporary(f"{y.name}_dense", g.output.dtype, y.shape)
    rows = tuple(Axis(f"m{i}", y.shape[i], a.strides[i], 0, out.strides[i]) for i in range(y.rank - 1))
    index = (*(symbol(r.name, 0) for r in rows), symbol("n", 0))
    c = Contraction("k", (), rows, (Axis("k", k, 1),), n, a.buffer("a"), _WEIGHTS, out.buffer("out", writable=True),
                    Packing("panels"), acc_dtype=DType.i32)  # fmt: skip
    c = replace(c, a_offset=activation_offset(c, ctx.isa))
    start = _Start(ctx, g, w_value, _sums(w_value, (0,)), c.a_offset)
    epilogue = Epilogue(ctx, g, lambda p: start.expr(p, y.shape, index, y.rank - 1), index)
    c = replace(c, epilogue=epilogue.expr, extra=epilogue.extra)
    site = byte_site(ctx, g, c)
    if lower_in_floats(ctx, g, site, a, range(y.rank)):
        return
    w, packing = _packed(ctx, w_value, c, w_value.data[None])
    _emit(ctx, "matmul_integer", replace(c, b=w.buffer("b"), packing=packing), a, w, out, epilogue, g, site)
    if out is not target:
        ctx.copy(out, target)


def lower_conv_integer(ctx: Lowering, g: Group) -> None:
    """A convolution without pads over channels-last views: one contraction per group, or vectors over channels where
    each has a filter of its own."""
    node = g.anchor
    x_value, w_value = _operand(g, 0), _operand(g, 1)
    assert x_value is not None and w_value is not None and w_value.data is not None
    attrs, y, rank = node.attrs, node.outputs[0], x_value.rank
    order = to_last(node)
    x = dense_channels(ctx, ctx.view(x_value).transpose(order), x_value.name)
    target = ctx.target(g.output).transpose(order)
    out = dense_results(ctx, g, target)
    weights, groups = w_value.data, attrs["group"]
    oc, cg = weights.shape[:2]
    strides, kernel = (1, *attrs["strides"]), weights.shape[2:]
    names = ("img", *(f"o{i}" for i in range(rank - 2)))
    rows = tuple(
        Axis(name, d, a * s, 0, o) for name, d, a, s, o in zip(names, out.shape, x.strides, strides, out.strides)
    )
    taps = tuple(Axis(f"k{i}", kernel[i], x.strides[i + 1] * attrs["dilations"][i]) for i in range(rank - 2))
    depthwise = groups == oc and cg == 1 and oc > 1
    lane = symbol("c" if depthwise else "n", 0)
    n = oc // groups
    channel: Dim = lane if groups == 1 or depthwise else symbol("g", 0) * n + lane
    index = own_index(node, [*(symbol(s, 0) for s in names), channel])
    a_buf, out_buf = x.buffer("a"), out.buffer("out", writable=True)
    batch: tuple[Axis, ...] = () if groups == 1 else (Axis("g", groups, cg, 0, n),)
    c = Contraction("k", batch, rows, (*taps, Axis("kc", cg, 1)), n, a_buf, _WEIGHTS, out_buf, Packing("panels"),
                    acc_dtype=DType.i32)  # fmt: skip
    c = replace(c, a_offset=depthwise_offset(x.dtype, ctx.isa) if depthwise else activation_offset(c, ctx.isa))
    start = _Start(ctx, g, w_value, _sums(w_value, tuple(range(1, rank))), c.a_offset)
    axis = order[-1]
    epilogue = Epilogue(ctx, g, lambda p: start.expr(p, y.shape, tuple(index), axis), index)
    if depthwise:
        data = np.ascontiguousarray(np.moveaxis(weights[:, 0], 0, -1))
        w = ctx.made_of((weights,), ("depthwise",), f"{w_value.name}_taps", lambda: data)
        with_b = tuple(replace(t, b=s) for t, s in zip(taps, w.strides[:-1], strict=True))
        d = Depthwise("k", rows, with_b, oc, a_buf, w.buffer("b"), out_buf, epilogue.expr, epilogue.extra, c.a_offset)
        site = byte_site(ctx, g, d)
        if lower_in_floats(ctx, g, site, x, order):
            return
        _emit(ctx, "depthwise_integer", d, x, w, out, epilogue, g, site)
    else:
        c = replace(c, epilogue=epilogue.expr, extra=epilogue.extra)
        site = byte_site(ctx, g, c)
        if lower_in_floats(ctx, g, site, x, order):
            return
        w, packing = _packed(ctx, w_value, c, _matrices(weights, groups))
        batch = tuple(replace(b, b=prod(w.shape[1:])) for b in batch)
        c = replace(c, batch=batch, b=w.buffer("b"), packing=packing)
        _emit(ctx, "conv_integer", c, x, w, out, epilogue, g, site)
    if out is not target:
        ctx.copy(out, target)


def _matrices(w: Array, groups: int) -> Array:
    """[oc, c, k..] -> [group, k.. and c, oc per group]."""
    by_group = w.reshape(groups, w.shape[0] // groups, *w.shape[1:])
    moved = np.moveaxis(np.moveaxis(by_group, 1, -1), 1, -2)
    return np.ascontiguousarray(moved.reshape(groups, -1, w.shape[0] // groups))


def _emit(
    ctx: Lowering, label: str, spec: Contraction | Depthwise, a: View, w: View, out: View, e: Epilogue, g: Group,
    site: Site,
) -> None:  # fmt: skip
    views: dict[Buffer, View] = {spec.a: a, spec.b: w, spec.out: out, **dict(zip(e.extra, e.views, strict=True))}
    if isinstance(spec, Contraction):
        emit_contraction(ctx, label, spec, views, g, tail_flops(g), site.ways)
    else:
        ordered = [views[p] for p in contraction_params(spec)]
        ctx.emit(label, spec, ordered, len(ordered) - 1, g.nodes, tail_flops(g), site=site)
