"""The loop IR: what one kernel computes, as loops over buffers. Everything between a fusion group and machine code.

    Kernel  := name, params: Buffer*, body: Stmt*                 a `For(kind=parallel)` may stand only at the top,
    alone
    Stmt    := For(var, extent, body, kind)                       var runs over 0 .. extent-1
             | Let(name, expr)                                    names a scalar for the statements that follow in the
             block
             | Store(buffer, index, value)
             | Guard(cond, body)                                  run body where cond holds
             | Fetch(buffer, index, level)                        ask for what will be read, into the cache of a level;
             it means nothing, and may lie outside of the buffer
             | Alloc(buffer)                                      a thread-local buffer, alive to the end of the
             block, static size
    Expr    := Const(value, dtype)
             | Index(dim, dtype)                                  an integer expression over loop variables and dims,
             as a value
             | Load(buffer, index, inside, fill)                  `fill` where a condition of `inside` (lo <= dim <
             hi) fails
             | Read(name)                                         the value of a Let, or of a name that the context
             supplies
             | Unary(fn, x) | Binary(fn, a, b) | Select(cond, a, b) | Cast(dtype, x)
             | Fma(a, b, c)                                       a * b + c in f32, rounded once where the CPU can
             | Lookup(table, dtype, x)                            entry x of 256 bytes; i8 stands for the u8 of its bits
             | Reduce(fn, var, extent, x)                         sum, prod, max or min of x over var

Rules:
* FLAT: `index` of Load and Store is one dim per axis of the buffer; the address is their dot product with its strides.
* PURE: expressions have no effects; a Reduce is evaluated where it stands.
* VECTOR: a `vector` loop has independent iterations: no iteration reads what another writes. It is a permission and a
  wish: the code generator computes several iterations at once. A Reduce inside a scalar context may itself be
  vectorized, and its sum is then re-associated (see `docs/architecture.md` on rounding).
* PARALLEL: the top `For` with kind `parallel` has independent iterations; the runtime hands out ranges of them to
  threads. Several perfectly nested parallel loops at the top form one flattened parallel space, the last varying
  fastest.
* GATHER: an index may contain loaded data through `Let` of an integer and `symbol(name)`: a Let whose expr is
  integer-typed may be used as a symbol in dims.
* DIMS: a symbol that is neither a loop variable nor a Let is a dim of the kernel, passed at run time;
  `dims_of(kernel)` lists them in order.

The reference meaning is `vivace.loops.reference`; types are checked by `vivace.loops.verify`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from vivace.base.dims import Dim, symbols
from vivace.base.dtypes import DType

LoopKind = Literal["serial", "parallel", "vector", "unroll"]

# Functions of f32 only: a weight of a softmax over the largest one, x * P(X < x) for a normal X, and three as exact as
# matters where the result is rounded to bf16 next.
OF_F32 = ("exp2", "gelu", "exp2_bf16", "sigmoid_bf16", "gelu_bf16")
# Functions of Unary: rounding is IEEE for neg abs sqrt floor ceil round(half to even) not isnan isinf; the rest have
# stated ulp errors.
UNARY = (
    "neg",
    "abs",
    "sqrt",
    "exp",
    "log",
    "erf",
    "sin",
    "cos",
    "tanh",
    "sigmoid",
    "floor",
    "ceil",
    "round",
    "not",
    "isnan",
    "isinf",
    "recip",
    "bitnot",
    "tan",
    "asin",
    "acos",
    "atan",
    "sinh",
    "cosh",
    "asinh",
    "acosh",
    "atanh",
    "log1p",
    "expm1",
    "sign",
    *OF_F32,
)
# Functions of Binary. Integer div truncates as C does; mod has the sign of the divisor (Python), fmod of the dividend
# (C).
# max and min propagate NaN as NumPy's maximum and minimum do. Comparisons give bool.
BINARY = (
    "add",
    "sub",
    "mul",
    "div",
    "mod",
    "fmod",
    "pow",
    "max",
    "min",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "and",
    "or",
    "xor",
    "bitand",
    "bitor",
    "bitxor",
    "shl",
    "shr",
)
# `maxnum` is the maximum of what is no NaN.
REDUCE = ("add", "mul", "max", "min", "maxnum")


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    """Memory with an element type, dims and strides in elements; compared by identity.

    `strides` may be any dims (0 broadcasts); the last is usually 1. `shape` bounds the index of each axis.
    """

    name: str
    dtype: DType
    shape: tuple[Dim, ...]
    strides: tuple[Dim, ...]
    writable: bool = False

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{','.join(map(str, self.shape))}]"


def dense_strides(shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """Row-major strides in elements."""
    strides: list[Dim] = []
    step: Dim = 1
    for d in reversed(shape):
        strides.append(step)
        step = step * d
    return tuple(reversed(strides))


@dataclass(frozen=True, slots=True)
class Inside:
    """The condition `lo <= dim < hi`."""

    dim: Dim
    lo: Dim
    hi: Dim


@dataclass(frozen=True, slots=True)
class Const:
    value: int | float | bool
    dtype: DType


@dataclass(frozen=True, slots=True)
class Index:
    dim: Dim
    dtype: DType = DType.i64


@dataclass(frozen=True, slots=True)
class Load:
    buffer: Buffer
    index: tuple[Dim, ...]
    inside: tuple[Inside, ...] = ()
    fill: int | float = 0


@dataclass(frozen=True, slots=True)
class Read:
    """The value of a `Let`, or of a name that the context supplies (the accumulator of a contraction's epilogue is
    `acc`)."""

    name: str
    dtype: DType


@dataclass(frozen=True, slots=True)
class Unary:
    fn: str
    x: Expr


@dataclass(frozen=True, slots=True)
class Binary:
    fn: str
    a: Expr
    b: Expr


@dataclass(frozen=True, slots=True)
class Fma:
    a: Expr
    b: Expr
    c: Expr


@dataclass(frozen=True, slots=True)
class Select:
    cond: Expr
    a: Expr
    b: Expr


@dataclass(frozen=True, slots=True)
class Cast:
    dtype: DType
    x: Expr


@dataclass(frozen=True, slots=True)
class Lookup:
    table: bytes
    dtype: DType
    x: Expr


@dataclass(frozen=True, slots=True)
class Reduce:
    fn: str
    var: str
    extent: Dim
    x: Expr


Expr = Const | Index | Load | Read | Unary | Binary | Fma | Select | Cast | Lookup | Reduce


@dataclass(frozen=True, slots=True)
class For:
    var: str
    extent: Dim
    body: tuple[Stmt, ...]
    kind: LoopKind = "serial"


@dataclass(frozen=True, slots=True)
class Let:
    name: str
    expr: Expr


@dataclass(frozen=True, slots=True)
class Store:
    buffer: Buffer
    index: tuple[Dim, ...]
    value: Expr


@dataclass(frozen=True, slots=True)
class Guard:
    cond: Expr
    body: tuple[Stmt, ...]


@dataclass(frozen=True, slots=True)
class Fetch:
    buffer: Buffer
    index: tuple[Dim, ...]
    level: int = 1


@dataclass(frozen=True, slots=True)
class Alloc:
    buffer: Buffer


Stmt = For | Let | Store | Guard | Fetch | Alloc


@dataclass(frozen=True, slots=True)
class Kernel:
    """One unit of generated code. `params` are in calling order: inputs first, then written buffers."""

    name: str
    params: tuple[Buffer, ...]
    body: tuple[Stmt, ...]
    meta: dict[str, object] = field(default_factory=dict, compare=False)


_COMPARE = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})


def dtype_of(e: Expr) -> DType:
    """The element type of an expression; operands of Binary and Select agree (rule checked by the verifier)."""
    match e:
        case Const(dtype=t) | Index(dtype=t) | Read(dtype=t) | Cast(dtype=t) | Lookup(dtype=t):
            return t
        case Load(buffer=b):
            return b.dtype
        case Unary(fn=fn, x=x):
            return DType.bool if fn in ("isnan", "isinf", "not") else dtype_of(x)
        case Binary(fn=fn, a=a):
            return DType.bool if fn in _COMPARE else dtype_of(a)
        case Select(a=a) | Fma(a=a):
            return dtype_of(a)
        case Reduce(x=x):
            return dtype_of(x)


def walk(node: Kernel | Stmt | Expr) -> Iterator[Stmt | Expr]:
    """Every statement and expression below `node`, itself included unless it is a Kernel, parents first."""
    match node:
        case Kernel(body=body):
            for s in body:
                yield from walk(s)
            return
        case For(body=body):
            yield node
            for s in body:
                yield from walk(s)
        case Guard(cond=c, body=body):
            yield node
            yield from walk(c)
            for s in body:
                yield from walk(s)
        case Let(expr=e) | Store(value=e):
            yield node
            yield from walk(e)
        case Unary(x=x) | Cast(x=x) | Lookup(x=x) | Reduce(x=x):
            yield node
            yield from walk(x)
        case Binary(a=a, b=b):
            yield node
            yield from walk(a)
            yield from walk(b)
        case Select(cond=a, a=b, b=c) | Fma(a=a, b=b, c=c):
            yield node
            yield from walk(a)
            yield from walk(b)
            yield from walk(c)
        case _:
            yield node


def dims_of(kernel: Kernel) -> tuple[str, ...]:
    """Names of the run-time dims of a kernel, sorted: symbols that no loop, reduce or let binds."""
    bound: set[str] = set()
    used: set[str] = set()

    def use(*dims: Dim) -> None:
        for d in dims:
            used.update(s.name for s in symbols(d))

    for b in kernel.params:
        use(*b.shape, *b.strides)
    for n in walk(kernel):
        match n:
            case For(var=v, extent=x) | Reduce(var=v, extent=x):
                bound.add(v)
                use(x)
            case Let(name=v):
                bound.add(v)
            case Load(index=ix, inside=cs):
                use(*ix)
                for c in cs:
                    use(c.dim, c.lo, c.hi)
            case Store(index=ix) | Fetch(index=ix):
                use(*ix)
            case Index(dim=d):
                use(d)
            case Alloc(buffer=b):
                use(*b.shape, *b.strides)
    return tuple(sorted(used - bound))
