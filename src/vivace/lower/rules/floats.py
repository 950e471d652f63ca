"""Products of bytes in f32, where they were measured to be faster so.

    before  total: i32 = conv_integer(q, w, zero, bias)              y = cast{to=@f32}(total)
    after   x: f32 = f32(q) - zero, a step of its own                y = conv(x, f32(w), f32(bias))

The numbers are the same: bytes less their zero points and sums below 2**24 are whole numbers that f32 holds (so without
Winograd, which rounds); larger sums round as those in f32 do. It may pay where rows of results are short and what
follows them takes most of the time. A site of bytes has this way beside its own one (`Site.ways`), and `tune` or
`precision="auto"` choose it; its time is that of both steps.

Not handled: zero points that only show when the model runs, sums that are read as integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vivace.base.dtypes import DType
from vivace.graph.graph import Node, Type, Value, freeze
from vivace.graph.ops import OPS
from vivace.loops.contraction import Contraction, Depthwise
from vivace.loops.kernel import Binary, Cast, Const, Expr
from vivace.lower.choices import DIRECT, FLOATS, Site
from vivace.lower.group import Group
from vivace.lower.lowering import Lowering
from vivace.lower.plan import Step
from vivace.lower.rules.contraction import lower_matmul
from vivace.lower.rules.conv import lower_conv
from vivace.lower.rules.elementwise import emit_pointwise
from vivace.lower.views import View

F32 = DType.f32


def byte_site(ctx: Lowering, g: Group, spec: Contraction | Depthwise) -> Site:
    """The site of an integer product, with its ways."""
    return Site(ctx.choices.key(spec), spec, () if _cast(ctx, g) is None else (DIRECT, FLOATS))


def lower_in_floats(ctx: Lowering, g: Group, site: Site, a: View, order: Sequence[int]) -> bool:
    """Whether a product of bytes was chosen to be one of f32; it is lowered then. `a` is its first operand as the
    product of bytes would read it, with the axes of the value in `order`.
    """
    cast = _cast(ctx, g)
    if cast is None or ctx.choices.of(site.spec).way != FLOATS:
        return False
    start, node = len(ctx.body), g.anchor
    q, w, zero, *rest = node.inputs
    assert q is not None and w is not None and zero is not None and zero.data is not None
    bias = None if not rest or rest[0] is None else _floats(ctx, rest[0])
    x = Value(f"{q.name}_f32", Type(F32, q.shape))
    widened = ctx.temporary(x.name, F32, a.shape)
    ctx.views[x] = widened.transpose(tuple(int(i) for i in np.argsort(order)))
    offset = Const(float(zero.data.reshape(-1)[0]), F32)

    def centred(xs: list[Expr]) -> Expr:
        return Binary("sub", Cast(F32, xs[0]), offset) if offset.value else Cast(F32, xs[0])

    emit_pointwise(ctx, "widen", [a], widened, centred, (node,))
    weights, nodes = _floats(ctx, w), [n for n in g.nodes if n not in (node, cast)]
    if node.op.name == "conv_integer":
        anchor = Node(OPS["conv"], (x, weights, bias), cast.outputs, node.attrs, node.origin)
        lower_conv(ctx, Group(anchor, g.position, (anchor, *nodes), g.output), is_exact=True)
    else:
        sums = cast.outputs if bias is None else (Value(f"{q.name}_sums", cast.output.type),)
        anchor = Node(OPS["matmul"], (x, weights), sums, freeze({}), node.origin)
        if bias is not None:
            nodes.insert(0, Node(OPS["add"], (*sums, bias), cast.outputs, freeze({}), node.origin))
        lower_matmul(ctx, Group(anchor, g.position, (anchor, *nodes), g.output))
    ctx.body[start:] = [replace(s, site=site) if isinstance(s, Step) else s for s in ctx.body[start:]]
    return True


def _cast(ctx: Lowering, g: Group) -> Node | None:
    """The cast to f32 that alone reads the sums, where this way is open."""
    _, w, zero, *rest = g.anchor.inputs
    total = g.anchor.output
    readers = [n for n in g.nodes if total in n.inputs]
    is_known = all(v is None or v.data is not None for v in (w, zero, *rest))
    is_cast = len(readers) == 1 and readers[0].op.name == "cast" and readers[0].output.dtype is F32
    return readers[0] if is_known and is_cast else None


def _floats(ctx: Lowering, v: Value) -> Value:
    """A constant of integers in f32, the same array for each lowering of a graph."""
    data = v.data
    assert data is not None
    made = ctx.made_of((data,), (FLOATS,), v.name, lambda: np.ascontiguousarray(data, np.float32)).storage
    assert made is not None and made.data is not None
    return Value(v.name, Type(F32, data.shape), made.data)
