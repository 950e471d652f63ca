"""Convolutions with few results per pixel and group: a vector of results would be half empty, so vectors run along
the taps.

Each result is a dot product of the window with the kernel. Windows whose rows are contiguous (channels-last, dilation
1) merge their innermost taps into one run, which should fill a vector.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vivace.base.dims import Dim, symbol
from vivace.base.dtypes import DType
from vivace.graph.graph import Value
from vivace.loops.contraction import Axis
from vivace.loops.kernel import Binary, Expr, For, Kernel, Let, Load, Read, Reduce, Stmt, Store
from vivace.lower.group import Group
from vivace.lower.lowering import Lowering, merge_axes
from vivace.lower.pack import without_denormals
from vivace.lower.rules.epilogue import Epilogue, tail_flops
from vivace.lower.views import View

MOST_RESULTS = 2  # per pixel and group; with 8, half-filled vectors are faster (58 against 30 GFLOP/s)
MOST_SUMS = 16  # accumulators of one loop
SHORTEST_RUN = 8  # contiguous taps; below it dot products are as empty as result vectors


def pays(w: Value, groups: int, taps: Sequence[Axis]) -> bool:
    """Whether dot products along the taps beat vectors of results. `taps`: spatial taps, then the channel."""
    if w.data is None or not isinstance(w.shape[0], int) or w.shape[0] // groups > MOST_RESULTS or groups > 4:
        return False
    run = merged(taps)[-1]
    return run.a == 1 and isinstance(run.extent, int) and run.extent >= SHORTEST_RUN


def merged(taps: Sequence[Axis]) -> list[Axis]:
    """The taps with neighbours that walk the input as one joined."""
    runs = merge_axes([t.extent for t in taps], [[t.a for t in taps]])
    joined: list[Axis] = []
    for run in runs:
        extent: Dim = 1
        for i in run:
            extent = extent * taps[i].extent
        joined.append(Axis(f"k{len(joined)}", extent, taps[run[-1]].a))
    return joined or [Axis("k0", 1, 1)]


def lower_narrow(
    ctx: Lowering,
    g: Group,
    x: View,
    out: View,
    rows: Sequence[Axis],
    taps: Sequence[Axis],
    epilogue: Epilogue,
) -> None:
    """Append the kernel. `x` and `out` are channels-last; `rows` are image and output positions; `epilogue` reads
    `acc`."""
    w_value = g.anchor.inputs[1]
    assert w_value is not None and w_value.data is not None
    groups, oc = g.anchor.attrs["group"], w_value.data.shape[0]
    n, cg = oc // groups, w_value.data.shape[1]
    run = merged(taps)
    by_tap = np.moveaxis(np.asarray(w_value.data, np.float32), 1, -1)  # [oc, k.., c]
    dense = without_denormals(np.array(by_tap, order="C"))
    weights = dense.reshape(groups, n, *(int(t.extent) for t in run))  # type: ignore[arg-type]
    w = ctx.made_of((w_value.data,), ("narrow",), f"{w_value.name}_rows", lambda: weights)
    windows = View(
        x.storage,
        x.dtype,
        (*(r.extent for r in rows), groups, *(t.extent for t in run)),
        (*(r.a for r in rows), cg, *(t.a for t in run)),
        x.offset,
    )
    a, b, result = windows.buffer("a"), w.buffer("b"), out.buffer("out", writable=True)
    last = rows[-1]
    block = _block(last.extent, n)
    group = symbol("g", 0)
    k = tuple(symbol(t.name, 0) for t in run)
    sums: list[Stmt] = []
    stores: list[Stmt] = []
    for p in range(block):
        at = (*(symbol(r.name, 0) for r in rows[:-1]), symbol(last.name, 0) * block + p)
        for j in range(n):
            value: Expr = Binary("mul", Load(a, (*at, group, *k)), Load(b, (group, j, *k)))
            for t in reversed(run):
                value = Reduce("add", t.name, t.extent, value)
            sums.append(Let(f"acc{p}_{j}", value))
            done = epilogue.at({last.name: at[-1], "n": j}, Read(f"acc{p}_{j}", DType.f32))
            stores.append(Store(result, (*at, group * n + j), done))
    body: For = For("g", groups, (*sums, *stores), "serial")
    for r in reversed(rows):
        extent = r.extent if r is not last else r.extent // block
        body = For(r.name, extent, (body,), "parallel")
    params = (a, b, *epilogue.extra, result)
    views = [windows, w, *epilogue.views, out]
    ctx.emit("conv", Kernel("k", params, (body,)), views, len(views) - 1, g.nodes, tail_flops(g))


def _block(extent: Dim, n: int) -> int:
    """Pixels computed together: they share the loads of the kernel. Their sums must stay in registers."""
    if not isinstance(extent, int):
        return 1
    return next(p for p in (8, 4, 2, 1) if p == 1 or (p * n <= MOST_SUMS and extent % p == 0))
