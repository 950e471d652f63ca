"""Rewriting: a rule looks at one node (the root) and what produces its operands, and answers with a replacement.

A rule's `apply(node, at)` returns
    None               the rule has nothing to say about this node;
    str                a near miss: the reason why it does not fire here, for people to read;
    Value(s)           what takes the place of the node's outputs, built with `at.op` (new nodes) or found in the graph.

`rewrite` runs rules to a fixpoint over one graph. Rules written as two traced functions are made by
`vivace.graph.pattern`; they compile to this.

Rules of the house:
* TYPES: a replacement has the type of what it replaces; the driver raises GraphError naming the rule where it has not.
* PROGRESS: a rule must not fire again on its own result; a graph that is rewritten `LIMIT` times per node is an
  InternalError.
* ORIGIN: new nodes take over the origins of the root and of every node that dies with it, and the name of the rule.
* OUTPUTS: graph outputs keep their names; a rewrite that would make an output a plain alias of an input or of another
  output is declined.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vivace.base.dtypes import DType
from vivace.base.errors import GraphError, InternalError
from vivace.graph.build import Builder, constant
from vivace.graph.graph import Graph, Node, Op, Value, subgraphs
from vivace.graph.text import parse_type, print_node

Outcome = Value | tuple[Value, ...] | str | None
Apply = Callable[[Node, "At"], Outcome]
LIMIT = 40


@dataclass(frozen=True, slots=True)
class Rule:
    """`apply` may replace nodes whose op is in `roots`; `examples` build graphs on which it fires (tests and
    documentation use them).

    `doc` is one line in IR notation, before = after, with the conditions.
    """

    name: str
    roots: tuple[str, ...]
    apply: Apply
    doc: str = ""
    examples: tuple[Callable[[Example], Any], ...] = ()

    def __str__(self) -> str:
        return self.name


def rule(*roots: str, examples: tuple[Callable[[Example], Any], ...] = ()) -> Callable[[Apply], Rule]:
    """Makes a Rule of a function: its name is the rule's, its docstring the rule's line of documentation."""

    def make(apply: Apply) -> Rule:
        return Rule(apply.__name__, roots, apply, (apply.__doc__ or "").strip(), examples)

    return make


class Emit(Builder):
    """A Builder whose ops take Python numbers: they become scalar constants of the other operand's dtype."""

    def emit(
        self, op: Op, inputs: Sequence[Any], attrs: dict[str, Any], names: Sequence[str] = ()
    ) -> tuple[Value, ...]:
        dtype = next((v.dtype for v in reversed(inputs) if isinstance(v, Value)), DType.f32)
        values = [v if isinstance(v, Value) or v is None else self.const(v, dtype) for v in inputs]
        return super().emit(op, values, attrs, names)


class Example(Emit):
    """Builds the graph of an example: `x("f32[2,3]")` adds an input, `w("f32[3]")` a constant with seeded contents."""

    def __init__(self) -> None:
        super().__init__(origin=("example",))
        self.random = np.random.default_rng(7)

    def x(self, type: str) -> Value:
        return self.input(f"x{len(self.inputs)}", parse_type(type))

    def w(self, type: str, low: float = -2.0, high: float = 2.0) -> Value:
        t = parse_type(type)
        shape = tuple(d for d in t.shape if isinstance(d, int))
        return self.const(self.random.uniform(low, high, shape).astype(t.dtype.numpy))

    def graph(self, build: Callable[[Example], Any]) -> Graph:
        """The graph of `build(self)`; nodes that its result does not need are left out."""
        outs = build(self)
        graph = self.finish(outs if isinstance(outs, tuple) else (outs,))
        return replace(_Editor(graph).finish(), inputs=tuple(self.inputs))


@dataclass(slots=True)
class At:
    """What a rule sees of the graph around its root, and where it builds."""

    op: Emit
    made: dict[Value, Node]
    readers: dict[Value, dict[Node, None]]
    outputs: set[Value]
    explaining: bool = False
    misses: list[tuple[int, str]] = field(default_factory=list)

    def by(self, v: Value | None, *ops: str) -> Node | None:
        """The node that makes `v`, if its op is one of `ops` (any op when none is given)."""
        n = self.made.get(v) if v is not None else None
        return n if n is not None and (not ops or n.op.name in ops) else None

    def users(self, v: Value) -> list[Node]:
        return list(self.readers.get(v, ()))

    def is_output(self, v: Value) -> bool:
        return v in self.outputs

    def only_use(self, v: Value | None) -> bool:
        """True when one node reads `v` and the graph does not return it."""
        return v is not None and len(self.readers.get(v, ())) == 1 and v not in self.outputs

    def const(self, data: np.ndarray | np.generic, name: str = "") -> Value:
        return constant(np.asarray(data), name or self.op.fresh(""))


@dataclass(slots=True)
class Log:
    """What happened in a rewrite: how often each rule fired, and the near misses of the rules asked about."""

    fired: Counter[str] = field(default_factory=Counter)
    explain: Sequence[str] = ()
    notes: list[str] = field(default_factory=list)


def scalar(v: Value | None) -> float | int | bool | None:
    """The number that a constant of one element holds, whatever its rank."""
    if v is None or v.data is None or v.data.size != 1 or v.data.dtype == object:
        return None
    x = v.data.reshape(())[()]
    return bool(x) if v.dtype is DType.bool else int(x) if v.dtype.is_int else float(x)


class _Editor:
    """A graph under change. Values keep their identity; nodes are replaced whole."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.made: dict[Value, Node] = {}
        self.readers: dict[Value, dict[Node, None]] = {}
        self.order: dict[Value, tuple[float, int]] = {}
        self.outputs = list(graph.outputs)
        self.output_set = set(graph.outputs)
        self.inputs = set(graph.inputs)
        self.count = 0
        for i, n in enumerate(graph.nodes):
            self.add(n, i)

    def add(self, n: Node, place: float) -> None:
        self.count += 1
        for v in n.outputs:
            self.made[v] = n
        self.order[n.outputs[0]] = (place, self.count)
        for u in n.inputs:
            if u is not None:
                self.readers.setdefault(u, {})[n] = None

    def drop(self, n: Node) -> None:
        for v in n.outputs:
            if self.made.get(v) is n:
                del self.made[v]
        for u in n.inputs:
            if u is not None:
                self.readers.get(u, {}).pop(n, None)

    def dying(self, root: Node, kept: set[Value]) -> list[Node]:
        """The root and the nodes that only it needs, once its outputs are replaced; `kept` are the operands of the
        replacement."""
        dead = {root: None}
        stack = [v for v in root.inputs if v is not None]
        while stack:
            v = stack.pop()
            n = self.made.get(v)
            if n is None or n in dead:
                continue
            if all(
                o not in kept and o not in self.output_set and dead.keys() >= self.readers.get(o, {}).keys()
                for o in n.outputs
            ):
                dead[n] = None
                stack.extend(u for u in n.inputs if u is not None)
        return list(dead)

    def replace(self, rule: str, root: Node, new: Sequence[Value], nodes: Sequence[Node]) -> list[Value] | None:
        """Put `new` in the place of the root's outputs; the values to look at again, or None when declined (rule
        OUTPUTS)."""
        fresh = {v for n in nodes for v in n.outputs}
        for old, v in zip(root.outputs, new, strict=True):
            if v.type != old.type:
                raise GraphError(f"rule {rule} replaces {old} by a {v.type} at\n  {print_node(root)}", where=rule)
            taken = v.data is None and v not in fresh and (v in self.inputs or v in self.output_set)
            if old in self.output_set and taken:
                return None
        kept = {v for n in nodes for v in n.inputs if v is not None} | set(new)
        dead = self.dying(root, kept)
        place = self.order[root.outputs[0]][0]
        origin = tuple(dict.fromkeys([*(o for n in reversed(dead) for o in n.origin), f"+{rule}"]))
        renamed: dict[Value, Value] = {}
        for old, v in zip(root.outputs, new, strict=True):
            if v in fresh and v not in renamed:
                renamed[v] = Value(old.name, v.type)
        for n in dead:
            self.drop(n)
        for n in nodes:
            m = replace(
                n,
                inputs=tuple(None if v is None else renamed.get(v, v) for v in n.inputs),
                outputs=tuple(renamed.get(v, v) for v in n.outputs),
                origin=origin,
            )
            self.add(m, place)
        again = [renamed.get(n.outputs[0], n.outputs[0]) for n in nodes]
        for old, v in zip(root.outputs, new, strict=True):
            v = renamed.get(v, v)
            for user in list(self.readers.pop(old, ())):
                self.drop(user)
                moved = replace(user, inputs=tuple(v if u is old else u for u in user.inputs))
                at = self.order[user.outputs[0]]
                self.add(moved, at[0])
                self.order[user.outputs[0]] = at
                again.append(user.outputs[0])
            if old in self.output_set:
                self.outputs = [v if o is old else o for o in self.outputs]
                self.output_set = set(self.outputs)
        again.extend(u.outputs[0] for n in dead for v in n.inputs if v is not None for u in self.readers.get(v, ()))
        return again

    def finish(self) -> Graph:
        """The nodes that the outputs need, each after its operands, otherwise in the old order; outputs under their
        old names."""
        keyed = sorted({n: self.order[n.outputs[0]] for n in self.made.values()}.items(), key=lambda t: t[1])
        live: set[Node] = set()
        stack = [self.made[v] for v in self.outputs if v in self.made]
        while stack:
            n = stack.pop()
            if n not in live:
                live.add(n)
                stack.extend(self.made[v] for v in n.inputs if v is not None and v in self.made)
        ordered: list[Node] = []
        done: set[Node] = set()
        for n, _ in keyed:
            if n in live and n not in done:
                self._emit(n, ordered, done)
        names: dict[Value, Value] = {}
        outs: list[Value] = []
        for old, v in zip(self.graph.outputs, self.outputs, strict=True):
            if v.name != old.name and (v.data is not None or (v in self.made and v not in names)):
                names[v] = replace(v, name=old.name)
            outs.append(names.get(v, v))
        if names:
            ordered = [_rename(n, names) for n in ordered]
        return Graph(self.graph.inputs, tuple(ordered), tuple(outs), self.graph.name)

    def _emit(self, n: Node, ordered: list[Node], done: set[Node]) -> None:
        stack = [(n, False)]
        while stack:
            m, ready = stack.pop()
            if ready:
                if m not in done:
                    done.add(m)
                    ordered.append(m)
                continue
            if m in done:
                continue
            stack.append((m, True))
            for v in reversed(m.inputs):
                p = self.made.get(v) if v is not None else None
                if p is not None and p not in done:
                    stack.append((p, False))


def _rename(n: Node, names: dict[Value, Value]) -> Node:
    if not any(v in names for v in (*n.inputs, *n.outputs)):
        return n
    ins = tuple(None if v is None else names.get(v, v) for v in n.inputs)
    return replace(n, inputs=ins, outputs=tuple(names.get(v, v) for v in n.outputs))


def rewrite(graph: Graph, rules: Iterable[Rule], log: Log | None = None) -> Graph:
    """Apply rules until none fires, in nested graphs too. Returns `graph` itself when none did."""
    log = log or Log()
    by_root: dict[str, list[Rule]] = {}
    for r in rules:
        for op in r.roots:
            by_root.setdefault(op, []).append(r)
    with np.errstate(all="ignore"):  # rules look at what they made of constants
        return _rewrite(graph, by_root, log)


def _rewrite(graph: Graph, by_root: dict[str, list[Rule]], log: Log) -> Graph:
    graph = map_subgraphs(graph, lambda g: _rewrite(g, by_root, log))
    anywhere = by_root.get("*", [])
    editor = _Editor(graph)
    before = log.fired.total()
    limit = LIMIT * (len(graph.nodes) + 10)
    sweep = True
    while sweep:
        start = log.fired.total()
        queue = deque(sorted({n.outputs[0] for n in editor.made.values()}, key=lambda v: editor.order[v]))
        waiting = set(queue)
        while queue:
            v = queue.popleft()
            waiting.discard(v)
            node = editor.made.get(v)
            if node is None:
                continue
            at = At(Emit(prefix=f"{v.name}."), editor.made, editor.readers, editor.output_set)
            for r in (*by_root.get(node.op.name, ()), *anywhere):
                again = _try(editor, r, node, at, log)
                if again is None:
                    continue
                for u in again:
                    if u not in waiting:
                        waiting.add(u)
                        queue.append(u)
                if log.fired.total() - before > limit:
                    raise InternalError(f"rules do not come to rest; the last to fire was {r.name}", where="rewrite")
                break
        sweep = log.fired.total() > start
    return editor.finish() if log.fired.total() > before else graph


def _try(editor: _Editor, rule: Rule, node: Node, at: At, log: Log) -> list[Value] | None:
    at.explaining = explaining = rule.name in log.explain
    if at.op.nodes or at.misses:  # what an earlier rule left when it thought better of it
        at.op, at.misses = Emit(prefix=at.op.prefix), []
    outcome = rule.apply(node, at)
    again: list[Value] | None = None
    if outcome is not None and not isinstance(outcome, str):
        new = outcome if isinstance(outcome, tuple) else (outcome,)
        again = editor.replace(rule.name, node, new, at.op.nodes)
        if again is not None:
            log.fired[rule.name] += 1
        else:
            outcome = "it would make a graph output an alias of an input or of another output"
    if explaining:
        if again is None and at.misses and not isinstance(outcome, str):
            outcome = max(at.misses)[1]
        if again is not None or isinstance(outcome, str):
            said = "fired" if again is not None else f"did not fire: {outcome}"
            log.notes.append(f"{rule.name} {said} at {print_node(node)}")
    return again


def map_subgraphs(graph: Graph, change: Callable[[Graph], Graph]) -> Graph:
    """The graph with `change` applied to the graphs in its nodes' attributes; the graph itself when nothing changed."""
    nodes: list[Node] = []
    for n in graph.nodes:
        if not subgraphs(n):
            nodes.append(n)
            continue
        attrs = {k: change(a) if isinstance(a, Graph) else a for k, a in n.attrs.items()}
        same = all(attrs[k] is n.attrs[k] for k in attrs)
        nodes.append(n if same else Node(n.op, n.inputs, n.outputs, attrs, n.origin))
    changed = any(a is not b for a, b in zip(nodes, graph.nodes))
    return replace(graph, nodes=tuple(nodes)) if changed else graph


def splice(at: At, graph: Graph, args: Sequence[Value]) -> tuple[Value, ...]:
    """Build a copy of a graph's nodes on `args`; the values of its outputs."""
    env: dict[Value, Value] = dict(zip(graph.inputs, args, strict=True))
    for n in graph.nodes:
        outs = tuple(Value(at.op.fresh(), v.type) for v in n.outputs)
        ins = tuple(None if v is None else env.get(v, v) for v in n.inputs)
        at.op.nodes.append(replace(n, inputs=ins, outputs=outs))
        env.update(zip(n.outputs, outs))
    return tuple(env.get(v, v) for v in graph.outputs)
