"""Expressions of the loop IR as LLVM values: scalars, or vectors over the lanes of the context.

A value that is equal in all lanes stays scalar until it meets a vector. Everything that an expression names comes from
`Env`. Used for the bodies of loop kernels and for what a contraction does to its results.

Rounding: every operation rounds as IEEE says, as the reference does; only sums of products in a Reduce use fused
multiply-add unasked. f16 and bf16 are computed in f32 and rounded where they are stored or cast.
"""

from __future__ import annotations

from vivace.base.dtypes import DType
from vivace.base.errors import InternalError
from vivace.loops.kernel import (
    Binary,
    Cast,
    Const,
    Expr,
    Fma,
    Index,
    Load,
    Lookup,
    Read,
    Reduce,
    Select,
    Unary,
    dtype_of,
)
from vivace.targets.cpu.arithmetic import binary, cast, unary
from vivace.targets.cpu.builder import Value, literal
from vivace.targets.cpu.env import Env, as_vector, is_uniform, per_lane, scalar
from vivace.targets.cpu.memory import load, register_type
from vivace.targets.cpu.reduce import reduce
from vivace.targets.cpu.tables import look_up


def emit(env: Env, e: Expr) -> Value:
    """The value of an expression: bool as i1, f16 and bf16 as float."""
    match e:
        case Const(value=v, dtype=t):
            return literal(v, register_type(t))
        case Read(name=name):
            if name not in env.names:
                raise InternalError(f"name {name} has no value here", where=env.b.name, expected=", ".join(env.names))
            return env.names[name]
        case Index(dim=d, dtype=t):
            value = scalar(env, d) if is_uniform(env, d) else as_vector(env, per_lane(env, d), _index_type(t))
            return cast(env.b, value, DType.i64 if value.type == "i64" else DType.i32, t)
        case Load():
            return env.given[e] if env.given and e in env.given else load(env, e)
        case Unary(fn=fn, x=x):
            return unary(env.b, fn, emit(env, x), dtype_of(x))
        case Binary(fn=fn, a=x, b=y):
            return binary(env.b, fn, emit(env, x), emit(env, y), dtype_of(x))
        case Fma(a=x, b=y, c=z):
            return env.b.fma(emit(env, x), emit(env, y), emit(env, z))
        case Select(cond=c, a=x, b=y):
            return env.b.select(emit(env, c), emit(env, x), emit(env, y))
        case Cast(dtype=DType.i32, x=Unary(fn="round", x=x)) if dtype_of(x) is DType.f32 and env.lanes >= 4:
            return _rounded(env, emit(env, x))
        case Lookup(table=table, x=x):
            return look_up(env.b, table, emit(env, x))
        case Cast(dtype=t, x=x):
            return cast(env.b, emit(env, x), dtype_of(x), t)
        case Reduce() if env.given and e in env.given:
            return env.given[e]
        case Reduce():
            return reduce(env, e, emit)


def emit_stored(env: Env, e: Expr, buffer: DType) -> Value:
    """The value of an expression that is stored next: the store itself rounds to half precision."""
    if isinstance(e, Cast) and e.dtype is buffer and buffer in (DType.f16, DType.bf16):
        return cast(env.b, emit(env, e.x), dtype_of(e.x), DType.f32)
    return emit(env, e)


def _rounded(env: Env, v: Value) -> Value:
    """Rounding to nearest even and conversion to i32 as one instruction; out of range as the conversion alone."""
    b = env.b
    v = b.widen(v, env.lanes)
    name = f"llvm.lrint.v{v.lanes}i32.v{v.lanes}f32"
    b.declare(f"<{v.lanes} x i32> @{name}({v.full})", name)
    return b.inst(f"call <{v.lanes} x i32> @{name}({v})", "i32", v.lanes, v)


def _index_type(t: DType) -> str:
    """Indices that are wanted in f32 or in 32 bits or less are computed in i32."""
    return "i64" if t in (DType.i64, DType.u64, DType.f64, DType.u32) else "i32"
