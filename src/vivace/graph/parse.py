"""Reading the text of a graph (see `vivace.graph.text` for its form): a tokenizer and a recursive-descent parser.

Errors are ModelErrors that name the line and show it.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from vivace.base.dim_notation import parse
from vivace.base.dims import Dim, substitute, symbol
from vivace.base.dtypes import DType
from vivace.base.errors import ModelError
from vivace.graph.graph import Graph, Node, Type, Value, freeze

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
        """Collects the tokens of one dim expression and hands them to `dim_notation.parse`."""
        parts, depth, at = [], 0, self.here[2]
        while (self.here[0] in ("word", "int", "end") or self.here[1] in ("(", ")", *_DIM_MARKS)) or (
            depth and self.here[1] == ","
        ):
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
        kind, text, _ = self.here
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
        return self.fail(at, f"found {text!r}", "a number")

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
            try:
                data = np.array(self.array(), dtype=type.dtype.numpy).reshape(shape)
            except (ValueError, OverflowError, TypeError):
                self.fail(at, f"the contents of constant %{name} do not fit its type", str(type))
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
