"""What happens to an accumulator before it is stored: the epilogue's expression over vectors along `n`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vivace.base.dims import Dim, linear
from vivace.base.errors import InternalError
from vivace.base.machine import Isa
from vivace.loops.kernel import Binary, Buffer, Const, Expr, Load, Read
from vivace.targets.cpu.contraction_text import Int, Text


@dataclass(frozen=True, slots=True)
class Place:
    """Where an accumulator stands: values of all axes and dims, buffer addresses, lanes that exist (None: all)."""

    env: Mapping[str, Int]
    bases: Mapping[Buffer, str]
    mask: str | None


def finish(t: Text, isa: Isa, e: Expr, acc: str, place: Place) -> str:
    w = isa.n_f32_lanes
    kind = f"<{w} x float>"
    match e:
        case Read(name="acc"):
            return acc
        case Const(value=v):
            return f"splat (float {float(v):e})"
        case Load(buffer=buffer, index=index):
            address: Dim = sum((i * s for i, s in zip(index, buffer.strides)), 0)
            found = linear(address, "n")
            if found is None or found[0] not in (0, 1):
                raise InternalError("epilogue load is neither contiguous nor constant along n")
            pointer = t.at(place.bases[buffer], t.mul(t.dim(address, place.env), 4))
            if found[0] == 0:
                x = t.op(f"load float, ptr {pointer}, align 4")
                first = t.op(f"insertelement {kind} poison, float {x}, i64 0")
                return t.op(f"shufflevector {kind} {first}, {kind} poison, <{w} x i32> zeroinitializer")
            if place.mask is None:
                return t.op(f"load {kind}, ptr {pointer}, align 4")
            t.declare(f"llvm.masked.load.v{w}f32.p0", f"{kind} @llvm.masked.load.v{w}f32.p0(ptr, i32, <{w} x i1>, {kind})")
            return t.op(
                f"call {kind} @llvm.masked.load.v{w}f32.p0(ptr {pointer}, i32 4, <{w} x i1> {place.mask}, {kind} zeroinitializer)"
            )
        case Binary(fn=fn, a=a, b=b):
            x, y = finish(t, isa, a, acc, place), finish(t, isa, b, acc, place)
            if fn in ("add", "sub", "mul", "div"):
                return t.op(f"f{fn} {kind} {x}, {y}")
            if fn in ("max", "min"):
                c = t.op(f"fcmp {'ogt' if fn == 'max' else 'olt'} {kind} {y}, {x}")
                return t.op(f"select <{w} x i1> {c}, {kind} {y}, {kind} {x}")
    raise InternalError(f"epilogue {e} is not supported")
