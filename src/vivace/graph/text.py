"""The text of a graph, and the way back.

    graph main(%x: f32[N,64]) {
      dim N in 1..512
      const %half: f32[] = 0.5
      const %w: f32[64,32]
      %t0: f32[N,32] = matmul(%x, %w)  # /fc/MatMul
      %t1: f32[N,32] = mul(%t0, %half)  # /fc/MatMul; +fold_scale
      return %t1
    }

Attributes stand in braces: `softmax{axis=-1}`; lists are tuples, `@f32` is a dtype, `none` is None, a nested graph is printed in place.
Rules:
* TINY: a constant of at most `TINY` elements is written out, bit for bit; a larger one is named, and its data travel beside the text.
* UNIQUE: two values, those of nested graphs included, never print under one name; the later of two gets a number.
* ROUND: `parse_graph(print_graph(g), constants_of(g))` prints the same text.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import numpy as np

from vivace.base.dims import Dim, Expr, Symbol, parse, substitute, symbol, symbols
from vivace.base.dtypes import DType
from vivace.base.errors import ModelError
from vivace.graph.graph import Graph, Node, Type, Value, freeze

TINY = 8
_PLAIN = re.compile(r"[A-Za-z0-9_./\-]+")


class _Names:
    """One name per value (rule UNIQUE)."""

    def __init__(self) -> None:
        self.of: dict[Value, str] = {}
        self.taken: set[str] = set()

    def __call__(self, v: Value | None) -> str:
        if v is None:
            return "none"
        if v not in self.of:
            name, k = v.name or "v", 1
            while name in self.taken:
                k += 1
                name = f"{v.name or 'v'}.{k}"
            self.taken.add(name)
            self.of[v] = name
        return quote(self.of[v])


def quote(name: str) -> str:
    """`%name`, in quotes when it holds characters that the grammar uses."""
    if _PLAIN.fullmatch(name):
        return f"%{name}"
    return "%" + _print_string(name)


def _print_string(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def print_graph(graph: Graph) -> str:
    """The whole graph as text."""
    return _print(graph, _Names(), "")


def _print(graph: Graph, names: _Names, indent: str) -> str:
    head = ", ".join(f"{names(v)}: {v.type}" for v in graph.inputs)
    lines = [f"graph {graph.name}({head}) {{"]
    lines += [_print_symbol(s) for s in _bounded_symbols(graph)] if not indent else []
    lines += [_print_const(names(v), v) for v in graph.constants()]
    lines += [_print_node(n, names, indent) for n in graph.nodes]
    lines.append(f"return {', '.join(names(v) for v in graph.outputs)}")
    return f"\n{indent}  ".join(lines) + f"\n{indent}}}"


def print_node(node: Node) -> str:
    """One line: `%y: f32[2] = relu(%x)  # origin`."""
    return _print_node(node, _Names(), "")


def constants_of(graph: Graph) -> dict[str, np.ndarray]:
    """The data that the text leaves out, by printed name; what `parse_graph` takes beside the text."""
    names = _Names()
    _print(graph, names, "")
    return {name: v.data for v, name in names.of.items() if v.data is not None and v.data.size > TINY}


def _print_node(n: Node, names: _Names, indent: str) -> str:
    outs = ", ".join(f"{names(v)}: {v.type}" for v in n.outputs)
    attrs = ", ".join(f"{k}={_print_attr(v, names, indent)}" for k, v in n.attrs.items())
    origin = "  # " + "; ".join(o.replace(";", ",").replace("\n", " ") for o in n.origin) if n.origin else ""
    return f"{outs} = {n.op.name}{'{' + attrs + '}' if attrs else ''}({', '.join(map(names, n.inputs))}){origin}"


def _print_attr(v: Any, names: _Names, indent: str) -> str:
    match v:
        case None | True | False:
            return {None: "none", True: "true", False: "false"}[v]
        case tuple() | list():
            return "[" + ", ".join(_print_attr(x, names, indent) for x in v) + "]"
        case DType():
            return f"@{v}"
        case str():
            return _print_string(v)
        case bytes():
            return "0x" + base64.b16encode(v).decode()
        case Graph():
            return _print(v, names, indent + "  ")
        case float() | np.floating():
            return repr(float(v))
        case _:
            return str(v)


def _print_symbol(s: Symbol) -> str:
    return f"dim {s.name} in {'' if s.lo is None else s.lo}..{'' if s.hi is None else s.hi}"


def _print_const(name: str, v: Value) -> str:
    data = v.data
    assert data is not None
    if data.size > TINY:
        return f"const {name}: {v.type}"
    return f"const {name}: {v.type} = {_print_array(data)}"


def _print_array(data: np.ndarray) -> str:
    if data.ndim:
        return "[" + ", ".join(_print_array(x) for x in data) + "]"
    x = data[()]
    if data.dtype == object:
        return _print_string(x.decode("latin1") if isinstance(x, bytes) else str(x))
    if data.dtype.kind == "b":
        return str(bool(x)).lower()
    return str(int(x)) if DType.of(data.dtype).is_int else repr(float(x))


def _attr_symbols(v: Any) -> Iterator[Symbol]:
    if isinstance(v, Expr):
        yield from symbols(v)
    elif isinstance(v, Type):
        yield from _attr_symbols(v.shape)
    elif isinstance(v, tuple):
        for x in v:
            yield from _attr_symbols(x)
    elif isinstance(v, Graph):
        yield from graph_symbols(v)


def graph_symbols(graph: Graph) -> Iterator[Symbol]:
    """Every symbol in the types and attributes of a graph, possibly repeated."""
    for v in (*graph.inputs, *(v for n in graph.nodes for v in n.outputs)):
        yield from _attr_symbols(v.type)
    for n in graph.nodes:
        for a in n.attrs.values():
            yield from _attr_symbols(a)


def _bounded_symbols(graph: Graph) -> list[Symbol]:
    return [s for s in dict.fromkeys(graph_symbols(graph)) if (s.lo, s.hi) != (0, None)]


_TOKEN = re.compile(
    r"""\s*(?:(?P<name>%(?:"(?:[^"\\]|\\.)*"|[A-Za-z0-9_./\-]+))|(?P<string>"(?:[^"\\]|\\.)*")|(?P<bytes>0x[0-9A-F]*)"""
    r"""|(?P<dtype>@\w+)|(?P<comment>\#[^\n]*)|(?P<float>-?(?:\d+\.\d*(?:e[+-]?\d+)?|\d+e[+-]?\d+|inf|nan)(?![\w.]))"""
    r"""|(?P<word>[A-Za-z_]\w*)|(?P<int>-?\d+)|(?P<mark>\.\.|//|[-(){}\[\]:,=+*%]))""",
)
_DIM_MARKS = frozenset({"+", "-", "*", "//", "%"})


class _Parser:
    def __init__(self, text: str, constants: Mapping[str, np.ndarray]) -> None:
        from vivace.graph.ops import OPS

        self.ops, self.constants, self.text = OPS, constants, text
        self.tokens: list[tuple[str, str, int]] = []
        self.bounds: dict[str, Dim] = {}
        at, end = 0, len(text.rstrip())
        while at < end:
            m = _TOKEN.match(text, at)
            if m is None:
                self.fail(at, "cannot read this")
            kind = m.lastgroup or ""
            self.tokens.append((kind, m.group(kind), m.start(kind)))
            at = m.end()
        self.i = 0

    def fail(self, at: int, what: str, expected: str = "") -> NoReturn:
        line = self.text.count("\n", 0, at) + 1
        text = self.text.splitlines()[line - 1].strip() if self.text.strip() else ""
        raise ModelError(f"{what}: {text!r}", where=f"line {line} of the graph text", expected=expected)

    @property
    def here(self) -> tuple[str, str, int]:
        return self.tokens[self.i] if self.i < len(self.tokens) else ("end", "", max(0, len(self.text.rstrip()) - 1))

    def next(self) -> tuple[str, str, int]:
        token = self.here
        self.i += 1
        return token

    def skip(self, text: str) -> bool:
        if self.here[1] == text and self.here[0] != "string":
            self.i += 1
            return True
        return False

    def need(self, text: str) -> None:
        if not self.skip(text):
            self.fail(self.here[2], f"found {self.here[1]!r}", repr(text))

    def kind(self, kind: str) -> str:
        if self.here[0] != kind:
            self.fail(self.here[2], f"found {self.here[1]!r}", f"a {kind}")
        return self.next()[1]

    def dim(self) -> Dim:
        """Collects the tokens of one dim expression and hands them to `dims.parse`."""
        parts, depth, at = [], 0, self.here[2]
        while (self.here[0] in ("word", "int", "end") or self.here[1] in ("(", ")", *_DIM_MARKS)) or (depth and self.here[1] == ","):
            if self.here[0] == "end" or (self.here[1] == ")" and depth == 0):
                break
            depth += {"(": 1, ")": -1}.get(self.here[1], 0)
            parts.append(self.next()[1])
        if not parts:
            self.fail(at, f"found {self.here[1]!r}", "a dim")
        return substitute(parse(" ".join(parts)), self.bounds)

    def type(self) -> Type:
        at = self.here[2]
        try:
            dtype = DType(self.kind("word"))
        except ValueError:
            self.fail(at, "unknown dtype")
        self.need("[")
        dims: list[Dim] = []
        while not self.skip("]"):
            dims.append(self.dim())
            self.skip(",")
        return Type(dtype, tuple(dims))

    def attr(self) -> Any:
        kind, text, at = self.here
        if kind == "string":
            return _unquote(self.next()[1])
        if kind == "bytes":
            return base64.b16decode(self.next()[1][2:])
        if kind == "dtype":
            return DType(self.next()[1][1:])
        if kind == "float":
            return float(self.next()[1])
        if self.skip("["):
            items = []
            while not self.skip("]"):
                items.append(self.attr())
                self.skip(",")
            return tuple(items)
        if kind == "word" and text in ("none", "true", "false"):
            return {"none": None, "true": True, "false": False}[self.next()[1]]
        if kind == "word" and text == "graph":
            return self.graph()
        if kind == "word" and text in DType.__members__ and self.tokens[self.i + 1][1] == "[":
            return self.type()
        return self.dim()

    def array(self) -> Any:
        if self.skip("["):
            items = []
            while not self.skip("]"):
                items.append(self.array())
                self.skip(",")
            return items
        kind, text, at = self.next()
        if kind == "string":
            return _unquote(text)
        if text in ("true", "false"):
            return text == "true"
        if kind in ("int", "float") or text in ("inf", "nan"):
            return int(text) if kind == "int" else float(text)
        self.fail(at, f"found {text!r}", "a number")

    def graph(self) -> Graph:
        self.need("graph")
        name = self.next()[1] if self.here[0] in ("word", "int") else "main"
        env: dict[str, Value] = {}
        start = self.i
        self._inputs({})  # read twice: the bounds of the symbols come after the inputs
        self.need("{")
        while self.skip("dim"):
            self._symbol()
        body, self.i = self.i, start
        inputs = self._inputs(env)
        self.i = body
        while self.skip("const"):
            self._const(env)
        nodes = []
        while not self.skip("return"):
            nodes.append(self._node(env))
        outputs = []
        while not self.skip("}"):
            outputs.append(self._value(env))
            self.skip(",")
        return Graph(tuple(inputs), tuple(nodes), tuple(v for v in outputs if v is not None), name)

    def _inputs(self, env: dict[str, Value]) -> list[Value]:
        self.need("(")
        found = []
        while not self.skip(")"):
            name, type = self._typed()
            env[name] = Value(name, type)
            found.append(env[name])
            self.skip(",")
        return found

    def _symbol(self) -> None:
        name = self.kind("word")
        self.need("in")
        lo = int(self.next()[1]) if self.here[0] == "int" else None
        self.need("..")
        self.bounds[name] = symbol(name, lo, int(self.next()[1]) if self.here[0] == "int" else None)

    def _typed(self) -> tuple[str, Type]:
        name = _name(self.kind("name"))
        self.need(":")
        return name, self.type()

    def _const(self, env: dict[str, Value]) -> None:
        at = self.here[2]
        name, type = self._typed()
        shape = tuple(d if isinstance(d, int) else self.fail(at, "a constant has fixed dims") for d in type.shape)
        if self.skip("="):
            data = np.array(self.array(), dtype=type.dtype.numpy).reshape(shape)
        elif name in self.constants:
            data = np.asarray(self.constants[name])
        else:
            self.fail(at, f"the data of constant %{name} are missing", f"an entry {name!r} beside the text")
        if data.shape != shape or DType.of(data.dtype) is not type.dtype:
            self.fail(at, f"the data of constant %{name} are {DType.of(data.dtype)}{list(data.shape)}", str(type))
        view = data.view()
        view.flags.writeable = False
        env[name] = Value(name, type, view)

    def _value(self, env: dict[str, Value]) -> Value | None:
        if self.skip("none"):
            return None
        at = self.here[2]
        name = _name(self.kind("name"))
        if name not in env:
            self.fail(at, f"%{name} is used before it is defined")
        return env[name]

    def _node(self, env: dict[str, Value]) -> Node:
        outs = [self._typed()]
        while self.skip(","):
            outs.append(self._typed())
        self.need("=")
        at = self.here[2]
        op = self.ops.get(self.kind("word"))
        if op is None:
            self.fail(at, "unknown op")
        attrs: dict[str, Any] = {}
        if self.skip("{"):
            while not self.skip("}"):
                key = self.kind("word")
                self.need("=")
                attrs[key] = self.attr()
                self.skip(",")
        self.need("(")
        inputs = []
        while not self.skip(")"):
            inputs.append(self._value(env))
            self.skip(",")
        origin: tuple[str, ...] = ()
        if self.here[0] == "comment":
            origin = tuple(part.strip() for part in self.next()[1][1:].split(";"))
        values = tuple(Value(n, t) for n, t in outs)
        env.update((v.name, v) for v in values)
        return Node(op, tuple(inputs), values, freeze(attrs), origin)


def _unquote(text: str) -> str:
    return re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], text[1:-1])


def _name(token: str) -> str:
    return _unquote(token[1:]) if token.startswith('%"') else token[1:]


def parse_graph(text: str, constants: Mapping[str, np.ndarray] | None = None) -> Graph:
    """Read a graph back; `constants` holds the data that the text leaves out (see `constants_of`).

    Raises: ModelError naming the line.
    """
    parser = _Parser(text, constants or {})
    graph = parser.graph()
    if parser.here[0] != "end":
        parser.fail(parser.here[2], "text after the end of the graph")
    return graph


def parse_type(text: str) -> Type:
    """Read `f32[N,64]`."""
    return _Parser(text, {}).type()
