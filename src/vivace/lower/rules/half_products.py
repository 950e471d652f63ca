"""Products of halves with f32 sums: by constant weights, which are packed at compile time, or by values that only show
when the model runs, which a step before the product packs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from vivace.base.dims import Dim, prod
from vivace.base.dtypes import DType
from vivace.base.machine import Isa
from vivace.graph.graph import Node, Value
from vivace.loops.contraction import Axis, Contraction, Packing, join_taps
from vivace.loops.kernel import Buffer
from vivace.loops.pack import Pack
from vivace.lower.arithmetic import LEAST_TILE_ROWS, arithmetic_of, choose_arithmetic, does_run_fill_tiles
from vivace.lower.group import Group
from vivace.lower.halves import is_widening
from vivace.lower.lowering import Lowering
from vivace.lower.pack import contiguous_run, pack_groups
from vivace.lower.rules.epilogue import Epilogue
from vivace.lower.tile import panel_lanes
from vivace.lower.views import View


def unpacked(c: Contraction, dtype: DType = DType.f32) -> Contraction:
    """The contraction before its constant weights are packed: what `Choices` know it by."""
    return replace(c, b=Buffer("b", dtype, (0,), (1,)), packing=Packing("panels"))


def is_half_product(ctx: Lowering, x: Value, w: Value | None) -> bool:
    """Whether a product reads halves: its operand widens them, and the weights (None: any) are constants that their
    type holds.
    """
    n = ctx.producer.get(x)
    if n is None or not is_widening(n) or n.inputs[0] is None or x in ctx.views:
        return False
    return w is None or (w.data is not None and ctx.fits(w, n.inputs[0].dtype))


def is_fast_half(half: DType, isa: Isa) -> bool:
    """Whether products of a half type have instructions of their own."""
    return choose_arithmetic(half, half, isa).kind not in ("split16", "wide16")


def pays_in_halves(x: View, node: Node, isa: Isa) -> bool:
    """Whether a convolution over a channels-last view of halves multiplies them as halves.

    Where the CPU has tile registers but windows have runs that fill none (7 taps of one channel), they are widened
    first and multiplied in f32, which took 0.25 to 0.7 of the time of vdpbf16ps on ten shapes: 172x264 by 7x7 to 32
    channels a third (Sapphire Rapids).
    """
    if not choose_arithmetic(x.dtype, x.dtype, isa).is_tile or (x.strides[-1] != 1 and x.shape[-1] != 1):
        return True
    w, attrs, y = node.inputs[1], node.attrs, node.outputs[0]
    assert w is not None
    sizes = y.shape[1:-1] if attrs["layout"] == "NHWC" else y.shape[2:]
    if all(isinstance(d, int) for d in sizes) and prod(sizes) < LEAST_TILE_ROWS:  # type: ignore[operator]
        return True
    steps = [s * d for s, d in zip(x.strides[1:-1], attrs["dilations"], strict=True)]
    taps = [Axis(f"k{i}", d, s) for i, (d, s) in enumerate(zip(w.shape[2:], steps, strict=True))]
    return does_run_fill_tiles(join_taps((*taps, Axis("kc", w.shape[1], 1))), x.dtype.size_bytes)


def half_contraction(
    ctx: Lowering, w: Value, how: str, make: Callable[[], np.ndarray], batch: tuple[Axis, ...], rows: tuple[Axis, ...],
    taps: tuple[Axis, ...], n: Dim, a: View, out: View, epilogue: Epilogue,
) -> tuple[Contraction, dict[Buffer, View]]:  # fmt: skip
    """A product of halves with constant weights `make()` [batch, k, n], and the views of its operands."""
    a_buf, out_buf = a.buffer("a"), out.buffer("out", writable=True)
    b_buf = Buffer("b", a.dtype, (0,), (1,))
    c = Contraction(
        "k", batch, rows, taps, n, a_buf, b_buf, out_buf, Packing("panels", 1), epilogue.expr, epilogue.extra
    )
    arithmetic = arithmetic_of(c, ctx.isa)
    chosen = ctx.choices.of(unpacked(c, a.dtype)).lanes
    run, lanes = contiguous_run(c), panel_lanes(n, ctx.isa, arithmetic, chosen)
    assert w.data is not None

    def pairs() -> np.ndarray:
        return pack_groups(np.ascontiguousarray(make()).astype(a.dtype.numpy), lanes, arithmetic.group, run)

    b = ctx.made_of((w.data,), ("groups", how, lanes, a.dtype, arithmetic.group, run), f"{w.name}_pairs", pairs)
    b_buf = b.buffer("b")
    batch = tuple(replace(x, b=prod(b.shape[1:])) for x in batch)
    c = replace(c, batch=batch, b=b_buf, packing=Packing("panels", lanes))
    return c, {a_buf: a, b_buf: b, out_buf: out, **dict(zip(epilogue.extra, epilogue.views, strict=True))}


def pair_contraction(
    ctx: Lowering, g: Group, b: View, batch: tuple[Axis, ...], rows: tuple[Axis, ...], n: Dim, a: View, out: View,
    epilogue: Epilogue,
) -> tuple[Contraction, dict[Buffer, View]]:  # fmt: skip
    """A product of bf16 with what only shows when the model runs, packed by a step of its own."""
    k, (k_stride, n_stride) = b.shape[-2], b.strides[-2:]
    n_stride = 1 if n == 1 else n_stride
    if n_stride != 1 and k_stride != 1:
        b = ctx.contiguous(b, "dense")
        k_stride, n_stride = b.strides[-2:]
        batch = tuple(replace(x, b=b.strides[int(x.name[1:])]) for x in batch)
    a_buf, b_buf, out_buf = a.buffer("a"), b.buffer("b"), out.buffer("out", writable=True)
    c = Contraction(
        "k", batch, rows, (Axis("k", k, 1),), n, a_buf, Buffer("b", DType.bf16, (0,), (1,)), out_buf,
        Packing("panels", 1), epilogue.expr, epilogue.extra,
    )  # fmt: skip
    lanes = panel_lanes(n, ctx.isa, arithmetic_of(c, ctx.isa))
    steps = tuple(Axis(x.name, x.extent, 0, x.b) for x in batch)
    pack = Pack("k", steps, k, n, k_stride, n_stride, b_buf, b_buf, lanes)
    panels = ctx.temporary("panels", DType.bf16, (prod([x.extent for x in batch]) * pack.size,))
    pack = replace(pack, out=panels.buffer("panels", writable=True))
    ctx.emit("pack", pack, [b, panels], 1, (g.anchor,), 0)
    c = replace(c, b=panels.buffer("b"), packing=Packing("panels", lanes))
    return c, {a_buf: a, c.b: panels, out_buf: out, **dict(zip(epilogue.extra, epilogue.views, strict=True))}
