"""Prints kernels and expressions for people, dumps and goldens.

kernel softmax(x: f32[R,C], out y: f32[R,C])
  parallel r in R:
    let m = max(k in C: x[r, k])
    vector c in C:
      y[r, c] = exp(x[r, c] - m)
"""

from __future__ import annotations

from collections.abc import Iterator
from zlib import crc32

from vivace.base.dims import Dim
from vivace.loops.kernel import (
    Alloc,
    Binary,
    Buffer,
    Cast,
    Const,
    Expr,
    Fetch,
    Fma,
    For,
    Guard,
    Index,
    Kernel,
    Let,
    Load,
    Lookup,
    Read,
    Reduce,
    Select,
    Stmt,
    Store,
    Unary,
    dense_strides,
)  # fmt: skip

_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "mod": "%", "eq": "==", "ne": "!=", "lt": "<", "le": "<=",
    "gt": ">", "ge": ">=", "and": "and", "or": "or", "xor": "xor", "bitand": "&", "bitor": "|", "bitxor": "^",
    "shl": "<<", "shr": ">>",
}  # fmt: skip
_REDUCE = {"add": "sum", "mul": "prod", "max": "max", "min": "min", "maxnum": "maxnum"}


def kernel_text(kernel: Kernel) -> str:
    """The kernel, one statement a line."""
    params = ", ".join(("out " if p.writable else "") + buffer_text(p) for p in kernel.params)
    lines = [f"kernel {kernel.name}({params})"]
    if kernel.meta:
        lines.append("  # " + ", ".join(f"{k}={v}" for k, v in sorted(kernel.meta.items())))
    return "\n".join([*lines, *_lines(kernel.body, "  ")]) + "\n"


def buffer_text(buffer: Buffer) -> str:
    """`x: f32[R,C]`, with strides where they are not row-major."""
    if buffer.strides == dense_strides(buffer.shape):
        return str(buffer)
    return f"{buffer} strides ({', '.join(map(str, buffer.strides))})"


def _lines(stmts: tuple[Stmt, ...], indent: str) -> Iterator[str]:
    for s in stmts:
        match s:
            case For(var=var, extent=n, body=body, kind=kind):
                yield f"{indent}{kind if kind != 'serial' else 'for'} {var} in {n}:"
                yield from _lines(body, indent + "  ")
            case Guard(cond=c, body=body):
                yield f"{indent}if {expr_text(c)}:"
                yield from _lines(body, indent + "  ")
            case Let(name=name, expr=e):
                yield f"{indent}let {name} = {expr_text(e)}"
            case Store(buffer=b, index=index, value=e):
                yield f"{indent}{b.name}[{_dims(index)}] = {expr_text(e)}"
            case Fetch(buffer=b, index=index, level=level):
                yield f"{indent}fetch {b.name}[{_dims(index)}] into level {level}"
            case Alloc(buffer=b):
                yield f"{indent}alloc {buffer_text(b)}"


def _dims(index: tuple[Dim, ...]) -> str:
    return ", ".join(map(str, index))


def expr_text(e: Expr, nested: bool = False) -> str:
    """The expression; operators that stand in another one get parentheses."""
    match e:
        case Const(value=v, dtype=t):
            return f"{v}:{t}" if t.value not in ("f32", "bool") else str(v)
        case Index(dim=d, dtype=t):
            return f"{t}({d})"
        case Load(buffer=b, index=index, inside=inside, fill=fill):
            text = f"{b.name}[{_dims(index)}]"
            if inside:
                text += " if " + " and ".join(f"{c.lo} <= {c.dim} < {c.hi}" for c in inside) + f" else {fill}"
            return f"({text})" if inside and nested else text
        case Read(name=name):
            return name
        case Unary(fn=fn, x=x):
            return f"{fn}({expr_text(x)})"
        case Binary(fn=fn, a=a, b=b) if fn in _INFIX:
            text = f"{expr_text(a, True)} {_INFIX[fn]} {expr_text(b, True)}"
            return f"({text})" if nested else text
        case Binary(fn=fn, a=a, b=b):
            return f"{fn}({expr_text(a)}, {expr_text(b)})"
        case Fma(a=a, b=b, c=c):
            return f"fma({expr_text(a)}, {expr_text(b)}, {expr_text(c)})"
        case Select(cond=c, a=a, b=b):
            text = f"{expr_text(a, True)} if {expr_text(c, True)} else {expr_text(b, True)}"
            return f"({text})" if nested else text
        case Cast(dtype=t, x=x):
            return f"{t}({expr_text(x)})"
        case Lookup(table=table, x=x):
            return f"table_{crc32(table):08x}({expr_text(x)})"
        case Reduce(fn=fn, var=var, extent=n, x=x):
            return f"{_REDUCE[fn]}({var} in {n}: {expr_text(x)})"
