"""Contractions: matrix products and convolutions as one affine form, the input of the micro-kernel generators.

    out[b.., m.., n] = epilogue(sum over r..  A[b.., m.., r..] * B[b.., r.., n])

`batch` axes stand in A, B and out; `rows` in A and out; `taps` (the reduction) in A and B; `n` in B and out.
A matrix product has one row axis and one tap. A convolution over channels-last data, its input already padded, has
row axes (image, oh, ow) and taps (kh, kw, channel): A's stride for `oh` is `stride_h * row`, for `kh` it is
`dilation_h * row`. A grouped convolution has the group as a batch axis. A depthwise convolution is `Depthwise`, which
vectorizes over channels instead.

Every extent and stride is a Dim in elements; those of taps other than the channel and of `n` are usually ints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from vivace.base.dims import Dim, linear, substitute, symbols
from vivace.base.dtypes import DType
from vivace.loops.kernel import (
    Binary,
    Buffer,
    Cast,
    Expr,
    Fma,
    Index,
    Inside,
    Load,
    Lookup,
    Reduce,
    Select,
    Unary,
    walk,
)

NO_BUFFERS: Mapping[Buffer, Buffer] = {}


@dataclass(frozen=True, slots=True)
class Axis:
    """One loop of a contraction: its extent and what a step of it adds to the address in A, B and out (0: it does not
    move).
    """

    name: str
    extent: Dim
    a: Dim = 0
    b: Dim = 0
    out: Dim = 0


@dataclass(frozen=True, slots=True)
class Packing:
    """How B lies in memory.

    `panels`: constant, packed at compile time as [batch][panel][r..][lanes] with `lanes` columns per panel,
    zero-filled; in low precision as [batch][panel][r../group][lanes][group], where the innermost tap (of the merged
    contraction) is filled up with zeros to a multiple of the group.

    `plain`: as its axes' strides say, `n` contiguous (n stride 1): read in place or packed on the fly.
    `transposed`: as its axes' strides say, the innermost tap contiguous (B stored as [n][k]): packed on the fly. A
    step of `n` adds `n_stride` to the address.
    """

    kind: str
    lanes: int = 0
    n_stride: Dim = 1


@dataclass(frozen=True, slots=True)
class Contraction:
    """A matrix product or convolution, with what happens to each result before it is stored.

    `epilogue` is an expression over `Read("acc", f32)` and loads whose index uses the symbols named by the batch and
    row axes and `n` (each axis's name is the loop variable). None stores the accumulator itself. The out address
    comes from the axes' `out` strides, `n`'s out stride is 1.

    `acc` is of `acc_dtype`: i32 for 8-bit A and B, else f32. `a_offset` is added to every element of A, in integers:
    0, or 128 for i8 (see `lower/arithmetic.py`).
    """

    name: str
    batch: tuple[Axis, ...]
    rows: tuple[Axis, ...]
    taps: tuple[Axis, ...]
    n: Dim
    a: Buffer
    b: Buffer
    out: Buffer
    packing: Packing
    epilogue: Expr | None = None
    extra: tuple[Buffer, ...] = ()
    acc_dtype: DType = DType.f32
    a_offset: int = 0


@dataclass(frozen=True, slots=True)
class Depthwise:
    """out[rows.., c] = epilogue(sum over taps  A[rows.., taps.., c] * B[taps.., c]); `c` is contiguous in A, B and
    out. `acc` is i32 where A and B are integers, else f32. `a_offset` is added to A, as in `Contraction`.
    """

    name: str
    rows: tuple[Axis, ...]
    taps: tuple[Axis, ...]
    channels: Dim
    a: Buffer
    b: Buffer
    out: Buffer
    epilogue: Expr | None = None
    extra: tuple[Buffer, ...] = ()
    a_offset: int = 0


def merge_axes(c: Contraction) -> Contraction:
    """The same contraction with as few axes as possible: extent-1 axes dropped, neighbours that step evenly joined.
    Low precision reads A in runs of neighbours: where the innermost tap has gaps, a run of one element stands inside.

    Before/After: rows (oh: 56 by 56*64, ow: 56 by 64) -> rows (ow: 3136 by 64), where A, out and every load of the
    epilogue allow it.
    """
    batch, epilogue = _drop_ones(c.batch, c.epilogue)
    rows, epilogue = _drop_ones(c.rows, epilogue)
    if c.packing.kind != "panels":  # packed taps lie densely in their order, whatever their strides say
        taps = tuple(t for t in c.taps if t.extent != 1)
        taps = _join_all(taps, lambda o, i: o.a == i.a * i.extent and o.b == i.b * i.extent)
    else:
        taps = join_taps(c.taps)
    if c.b.dtype is not DType.f32 and taps and taps[-1].a != 1:
        taps = (*taps, Axis("run", 1, 1))
    while (pair := next((p for p in pairwise(rows) if _joins(*p, epilogue)), None)) is not None:
        outer, _ = pair
        epilogue = None if epilogue is None else substitute_expr(epilogue, {outer.name: 0})
        rows = _join(rows, pair)
    return replace(c, batch=batch, rows=rows, taps=taps, epilogue=epilogue)


def join_taps(taps: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """Taps with neighbours joined that step evenly in A, those of extent 1 dropped."""
    return _join_all(tuple(t for t in taps if t.extent != 1), lambda o, i: o.a == i.a * i.extent)


def _drop_ones(axes: tuple[Axis, ...], epilogue: Expr | None) -> tuple[tuple[Axis, ...], Expr | None]:
    ones: dict[str, Dim] = {x.name: 0 for x in axes if x.extent == 1}
    if epilogue is not None and ones:
        epilogue = substitute_expr(epilogue, ones)
    return tuple(x for x in axes if x.extent != 1), epilogue


def _join(axes: tuple[Axis, ...], pair: tuple[Axis, Axis]) -> tuple[Axis, ...]:
    outer, inner = pair
    at = axes.index(outer)
    return (*axes[:at], replace(inner, extent=outer.extent * inner.extent), *axes[at + 2 :])


def _join_all(axes: tuple[Axis, ...], may: Callable[[Axis, Axis], bool]) -> tuple[Axis, ...]:
    while (pair := next((p for p in pairwise(axes) if may(*p)), None)) is not None:
        axes = _join(axes, pair)
    return axes


def _joins(outer: Axis, inner: Axis, epilogue: Expr | None) -> bool:
    """Whether address(outer, inner) == address(0, outer * extent + inner) in A, out and all loads of the epilogue."""
    if outer.a != inner.a * inner.extent or outer.out != inner.out * inner.extent:
        return False
    names = {outer.name, inner.name}
    for e in walk(epilogue) if epilogue is not None else ():
        match e:
            case Index(dim=d) if any(s.name in names for s in symbols(d)):
                return False
            case Load(buffer=buffer, index=index, inside=inside):
                if any(s.name in names for i in inside for s in symbols(i.dim)):
                    return False
                address = sum((i * s for i, s in zip(index, buffer.strides)), 0)
                o, i = linear(address, outer.name), linear(address, inner.name)
                if o is None or i is None or o[0] != i[0] * inner.extent:
                    return False
    return True


def substitute_expr(e: Expr, env: Mapping[str, Dim], buffers: Mapping[Buffer, Buffer] = NO_BUFFERS) -> Expr:
    """`e` with the symbols of every dim in it replaced, and some buffers by others."""

    def inner(x: Expr) -> Expr:
        return substitute_expr(x, env, buffers)

    match e:
        case Index(dim=d):
            return replace(e, dim=substitute(d, env))
        case Load(buffer=buffer, index=index, inside=inside):
            return replace(
                e,
                buffer=buffers.get(buffer, buffer),
                index=tuple(substitute(i, env) for i in index),
                inside=tuple(
                    Inside(substitute(i.dim, env), substitute(i.lo, env), substitute(i.hi, env)) for i in inside
                ),
            )
        case Unary(x=x) | Cast(x=x) | Lookup(x=x) | Reduce(x=x):
            return replace(e, x=inner(x))
        case Binary(a=a, b=b):
            return replace(e, a=inner(a), b=inner(b))
        case Fma(a=a, b=b, c=c):
            return Fma(inner(a), inner(b), inner(c))
        case Select(cond=cond, a=a, b=b):
            return Select(inner(cond), inner(a), inner(b))
        case _:
            return e


def contraction_dims(c: Contraction | Depthwise) -> tuple[str, ...]:
    """Names of the run-time dims, sorted: every symbol in an extent, stride or epilogue that is not an axis of the
    contraction.
    """
    batch = c.batch if isinstance(c, Contraction) else ()
    axes = (*batch, *c.rows, *c.taps)
    lane_name, width = ("n", c.n) if isinstance(c, Contraction) else ("c", c.channels)
    dims: list[Dim] = [width, c.packing.n_stride if isinstance(c, Contraction) else 1]
    for x in axes:
        dims += [x.extent, x.a, x.b, x.out]
    for e in walk(c.epilogue) if c.epilogue is not None else ():
        match e:
            case Index(dim=d):
                dims.append(d)
            case Load(buffer=buffer, index=index, inside=inside):
                dims += [*index, *buffer.strides]
                for i in inside:
                    dims += [i.dim, i.lo, i.hi]
            case Reduce(extent=extent):
                dims.append(extent)
    names = {s.name for d in dims for s in symbols(d)}
    return tuple(sorted(names - {x.name for x in axes} - {lane_name}))


def contraction_params(c: Contraction | Depthwise) -> tuple[Buffer, ...]:
    """The buffers in calling order: A, B, the epilogue's, out. A buffer that stands twice is passed once."""
    return tuple(dict.fromkeys((c.a, c.b, *c.extra, c.out)))
