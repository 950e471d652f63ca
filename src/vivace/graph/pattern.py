"""Rules written as two functions: `before` is traced into a pattern, `after` builds what takes its place.

    gelu = pattern(
        "fuse_gelu",
        before=lambda op, x: op.mul(x, op.add(op.erf(op.mul(x, SQRT_HALF)), 1), 0.5),
        after=lambda op, x: op.gelu(x, approximate="none"),
        sample=("f32[2,8]",),
    )

In `before`, each parameter after `op` is a variable that stands for one value (the same value wherever it is named),
and
    op.add(a, b)            the op; add, mul, max, min, and, or, eq, ... in either order of operands
    op.mul(a, b, c)         a product (sum, ...) of three or more factors, in any order and association
    0.5                     a constant whose every element is close to 0.5
    op.scalar("c")          a constant of one element; `after` and `when` get its number as `c`
    op.const(w)             the variable, which must be a constant
    op.either(p, q)         either pattern; variables of the one that did not match are None
    op.transpose(x, perm=op.attr("perm"))   an attribute bound to a variable; `perm=(0, 2, 1)` one of that value;
    others are free
    op.concat(op.each("xs"), axis=...)      any number of operands, bound as a tuple
    op.named("y", p)        the value that `p` matched, bound to `y`
`after(op, ...)` and `when(...)` take the bound names that they ask for. `when` returns a reason not to fire, or None.

The nodes inside a match must have no other reader, unless the rule says `shared=True`: a fusion does not duplicate
work.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vivace.base.errors import GraphError
from vivace.graph.graph import Node, Value
from vivace.graph.rewrite import At, Example, Outcome, Rule, scalar

COMMUTATIVE = frozenset({"add", "mul", "max", "min", "eq", "ne", "and", "or", "xor", "bitand", "bitor", "bitxor"})
Env = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Var:
    """A value; `constant` restricts it to constants."""

    name: str
    constant: bool = False


@dataclass(frozen=True, slots=True)
class Number:
    """A constant that holds `value` everywhere."""

    value: float


@dataclass(frozen=True, slots=True)
class Scalar:
    """A constant of one element, bound as a number."""

    name: str


@dataclass(frozen=True, slots=True)
class Each:
    """All operands of a node, bound as a tuple."""

    name: str


@dataclass(frozen=True, slots=True)
class Attr:
    """An attribute, bound."""

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One application of an op."""

    op: str
    args: tuple[Any, ...]
    attrs: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Either:
    """One of several patterns, tried in order."""

    options: tuple[Any, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Named:
    """A pattern whose value is bound as well."""

    name: str
    pattern: Any


class Tracer:
    """What `before` is called with when its pattern is traced."""

    def scalar(self, name: str, default: float = 1.0) -> Scalar:
        return Scalar(name)

    def attr(self, name: str, default: Any = None) -> Attr:
        return Attr(name)

    def each(self, name: str) -> Each:
        return Each(name)

    def const(self, v: Var) -> Var:
        return Var(v.name, constant=True)

    def either(self, *options: Any) -> Either:
        return Either(options)

    def named(self, name: str, pattern: Any) -> Named:
        return Named(name, pattern)

    def __getattr__(self, op: str) -> Callable[..., Call]:
        def call(*args: Any, **attrs: Any) -> Call:
            return Call(op.rstrip("_"), tuple(Number(a) if isinstance(a, (int, float)) else a for a in args), attrs)

        return call


class Concrete:
    """What `before` is called with when an example of it is built: the pattern's words become nodes of an Example.

    `choice` selects the option of every `either` (modulo their number); `flip` swaps commutative operands.
    """

    def __init__(self, build: Example, choice: int, flip: bool) -> None:
        self.build, self.choice, self.flip = build, choice, flip

    def scalar(self, name: str, default: float = 1.0) -> float:
        return default

    def attr(self, name: str, default: Any = None) -> Any:
        return default

    def const(self, v: Value) -> Value:
        size = tuple(d for d in v.shape if isinstance(d, int))
        data = self.build.random.uniform(-2, 2, size).astype(v.dtype.numpy)
        if v in self.build.inputs:
            self.build.inputs.remove(v)
        return self.build.const(data)

    def either(self, *options: Any) -> Any:
        return options[self.choice % len(options)]

    def named(self, name: str, value: Any) -> Any:
        return value

    def __getattr__(self, op: str) -> Callable[..., Any]:
        def call(*args: Any, **attrs: Any) -> Any:
            apply = getattr(self.build, op)
            commutes = op.rstrip("_") in COMMUTATIVE
            if commutes and len(args) > 1:
                args = args[::-1] if self.flip else args
                result = args[0]
                for a in args[1:]:
                    result = apply(result, a)
                return result
            return apply(*args, **attrs)

        return call


def close(data: np.ndarray, value: float) -> bool:
    """True when every element is `value`, as exactly as the dtype tells."""
    x = np.asarray(data, dtype=np.float64)
    loose = data.dtype.itemsize < 4
    return bool(data.size) and bool(np.all(np.abs(x - value) <= (4e-3 if loose else 2e-6) * abs(value)))


class _Matcher:
    """One attempt: yields environments; keeps the nodes of the match under the key None."""

    def __init__(self, at: At, rule: str) -> None:
        self.at, self.rule = at, rule
        self.made = at.made

    def miss(self, depth: int, why: Callable[[], str]) -> None:
        if self.at.explaining:
            self.at.misses.append((depth, why()))

    def value(self, p: Any, v: Value | None, env: Env, depth: int) -> Iterator[Env]:
        match p:
            case Call():
                if v is None:
                    return
                n = self.made.get(v)
                if n is None or n.op.name != p.op:
                    self.miss(depth, lambda: f"%{v.name} is made by {n.op.name if n else 'no node'}, not by {p.op}")
                    return
                yield from self.node(p, n, env, depth)
            case Var():
                if v is None:
                    return
                if p.constant and v.data is None:
                    self.miss(depth, lambda: f"%{v.name} is no constant")
                elif p.name not in env:
                    yield {**env, p.name: v}
                elif same_value(env[p.name], v):
                    yield env
                else:
                    self.miss(depth, lambda: f"{p.name} is both %{env[p.name].name} and %{v.name}")
            case Number():
                if v is not None and v.data is not None and v.data.dtype != object and close(v.data, p.value):
                    yield env
                elif v is not None:
                    self.miss(depth, lambda: f"%{v.name} is not the constant {p.value:g}")
            case Scalar():
                c = scalar(v)
                if c is not None and env.get(p.name, c) == c:
                    yield {**env, p.name: c}
            case Either():
                for option in p.options:
                    yield from self.value(option, v, env, depth)
            case Named():
                for found in self.value(p.pattern, v, env, depth):
                    yield {**found, p.name: v}

    def node(self, p: Call, n: Node, env: Env, depth: int) -> Iterator[Env]:
        for k, want in p.attrs.items():
            got = n.attrs.get(k)
            if isinstance(want, Attr):
                if want.name in env and env[want.name] != got:
                    return
                env = {**env, want.name: got}
            elif got != want:
                self.miss(depth, lambda k=k, got=got, want=want: f"{n.op.name} has {k}={got}, not {want}")  # type: ignore[misc]
                return
        env = {**env, "": (*env.get("", ()), n)}
        args = p.args
        if len(args) == 1 and isinstance(args[0], Each):
            yield {**env, args[0].name: n.inputs}
        elif p.op in COMMUTATIVE and len(args) > 2:
            yield from self.chain(p, args, n, env, depth)
        elif p.op in COMMUTATIVE:
            a, b = n.inputs
            yield from self.operands(args, (a, b), env, depth)
            yield from self.operands(args, (b, a), env, depth)
        elif len(args) >= len(n.inputs):
            yield from self.operands(args, n.inputs, env, depth)

    def operands(self, args: tuple[Any, ...], values: tuple[Value | None, ...], env: Env, depth: int) -> Iterator[Env]:
        if not args:
            yield env
            return
        v = values[0] if values else None
        for found in self.value(args[0], v, env, depth + 1):
            yield from self.operands(args[1:], values[1:], found, depth)

    def chain(self, p: Call, args: tuple[Any, ...], n: Node, env: Env, depth: int) -> Iterator[Env]:
        """Splits the factors between the two operands of `n` in every way; a part of several factors needs the same op
        again."""
        a, b = n.inputs
        for k in range(1, len(args)):
            for left in itertools.combinations(range(len(args)), k):
                right = tuple(i for i in range(len(args)) if i not in left)
                for found in self.part(p, tuple(args[i] for i in left), a, env, depth):
                    yield from self.part(p, tuple(args[i] for i in right), b, found, depth)

    def part(self, p: Call, args: tuple[Any, ...], v: Value | None, env: Env, depth: int) -> Iterator[Env]:
        if len(args) == 1:
            yield from self.value(args[0], v, env, depth + 1)
        elif v is not None and (n := self.made.get(v)) is not None and n.op.name == p.op:
            inner = {**env, "": (*env.get("", ()), n)}
            if len(args) > 2:
                yield from self.chain(p, args, n, inner, depth + 1)
            else:
                x, y = n.inputs
                yield from self.operands(args, (x, y), inner, depth)
                yield from self.operands(args, (y, x), inner, depth)


def same_value(a: Any, b: Value) -> bool:
    """The same value, or two small constants with equal contents."""
    if a is b:
        return True
    if not isinstance(a, Value) or a.data is None or b.data is None or a.type != b.type or a.data.size > 64:
        return False
    return bool(np.array_equal(a.data, b.data))


def _roots(p: Any) -> tuple[str, ...]:
    match p:
        case Call():
            return (p.op,)
        case Either():
            return tuple(dict.fromkeys(r for o in p.options for r in _roots(o)))
        case Named():
            return _roots(p.pattern)
    raise TypeError(f"a pattern ends in an op, not in {p!r}")


def _caller(fn: Callable[..., Any], skip: int) -> Callable[[Env], dict[str, Any]]:
    names = list(inspect.signature(fn).parameters)[skip:]
    return lambda env: {k: env.get(k) for k in names}


def pattern(
    name: str,
    before: Callable[..., Any],
    after: Callable[..., Any],
    *,
    when: Callable[..., str | None] | None = None,
    sample: tuple[str, ...] = ("f32[2,8]",),
    doc: str = "",
    shared: bool = False,
    choices: int = 1,
) -> Rule:
    """The Rule of two traced functions; `sample` gives the types of `before`'s variables in its examples, `choices`
    their number."""
    variables = list(inspect.signature(before).parameters)[1:]
    traced = before(Tracer(), *(Var(v) for v in variables))
    root = traced
    take_after = _caller(after, 1)
    take_when = _caller(when, 0) if when else None

    def apply(node: Node, at: At) -> Outcome:
        matcher = _Matcher(at, name)
        for top in root.options if isinstance(root, Either) else (root,):
            for env in matcher.value(top, node.outputs[0], {}, 0):
                nodes = env[""]
                reason = None if shared else _used_elsewhere(nodes, node, at)
                if reason is None and when is not None and take_when is not None:
                    reason = when(**take_when(env))
                if reason is None:
                    return _build(env, node, at)
                at.misses.append((99, reason))
        return None

    def _build(env: Env, node: Node, at: At) -> Outcome:
        try:
            new: Value | tuple[Value, ...] = after(at.op, **take_after(env))
        except GraphError as e:
            at.op.nodes.clear()
            return f"the replacement has no type: {e}"
        got = new if isinstance(new, tuple) else (new,)
        want = [v.type for v in node.outputs]
        if [v.type for v in got] != want:
            at.op.nodes.clear()
            return f"the replacement would be {', '.join(str(v.type) for v in got)}, not {', '.join(map(str, want))}"
        return new

    def example(choice: int, flip: bool) -> Callable[[Example], Any]:
        def build(e: Example) -> Any:
            args = [e.x(t) for t in sample]
            return before(Concrete(e, choice, flip), *args)

        return build

    examples = tuple(example(c, f) for c in range(choices) for f in (False, True))
    return Rule(name, _roots(traced), apply, doc, examples)


def _used_elsewhere(nodes: tuple[Node, ...], root: Node, at: At) -> str | None:
    matched = set(nodes)
    for n in nodes:
        if n is root:
            continue
        for v in n.outputs:
            if at.is_output(v) or not matched.issuperset(at.readers.get(v, {})):
                return f"%{v.name} is used elsewhere too"
    return None


SQRT_HALF = math.sqrt(0.5)
SQRT_2_OVER_PI = math.sqrt(2 / math.pi)


def is_float(*values: Value | None) -> bool:
    """True when every value present is of a floating type."""
    return all(v is None or v.dtype.is_float for v in values)
