"""Stores of neighbouring elements in turn, such as the channels of a pixel, as whole vectors.

    vector i in N: unroll c in 3:  y[i, c] = f(i, c)       y dense

computes a vector of each c, interleaves them and stores three full vectors. Where pixels are wider than what is stored
of them, what lies between is left out by masks.
"""

from __future__ import annotations

from collections.abc import Callable

from vivace.base.dtypes import DType
from vivace.loops.kernel import Cast, Expr, For, Store, dtype_of
from vivace.targets.cpu.builder import Value, literal
from vivace.targets.cpu.env import Env, lane_stride
from vivace.targets.cpu.memory import flat_index, memory_type, register_type, write_vector
from vivace.targets.cpu.shuffles import interleave, shuffle
from vivace.targets.cpu.tiles import linear_in

_MOST = 8  # parts; more would not stay in registers


def store_interleaved(env: Env, loop: For, emit: Callable[[Env, Expr], Value]) -> bool:
    """Emit an unrolled loop around one store as interleaved vectors; False where its stores are too far apart."""
    s, n = loop.extent, env.lanes
    if env.lane is None or not isinstance(s, int) or not 2 <= s <= _MOST or len(loop.body) != 1 or n < 4:
        return False
    body = loop.body[0]
    if not isinstance(body, Store):
        return False
    dtype, value = body.buffer.dtype, body.value
    if dtype in (DType.f16, DType.bf16):  # interleaved as f32, rounded when stored
        value = value.x if isinstance(value, Cast) and value.dtype is dtype else value
        if dtype_of(value) is not DType.f32:
            return False
    elif memory_type(dtype) not in ("float", "i32"):
        return False
    flat = flat_index(body.buffer, body.index)
    at = env.at({loop.var: literal(0, "i64")})
    width = lane_stride(at, flat)
    if not isinstance(width, int) or not s <= width <= _MOST or linear_in(flat, loop.var) != 1:
        return False
    if register_type(dtype) == "i1":
        return False
    b = env.b
    values = [b.widen(emit(env.at({loop.var: literal(k, "i64")}), value), n) for k in range(s)]
    values += [values[-1]] * (width - s)  # anything
    inside = Value("<" + ", ".join(["i1 true"] * n) + ">", "i1", n) if env.mask is None else env.mask
    none = Value("zeroinitializer", "i1", n)
    for k, vector in enumerate(interleave(b, values)):
        mask = None
        if env.mask is not None or width > s:
            at_lane = range(k * n, (k + 1) * n)
            mask = shuffle(b, inside, none, [i // width if i % width < s else n for i in at_lane])
        write_vector(at, body.buffer, flat + k * n, vector, mask)
    return True
