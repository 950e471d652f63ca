"""Import: an ONNX model becomes a Graph.

* Initializers and Constant nodes become constants; an initializer that is also an input is a constant (it cannot be
  fed any more).
* Symbolic dims keep their names; unnamed ones (-1, "?", empty) get a symbol of their own, `<input>_<axis>`. A symbol
  may be 0 unless the model cannot be: bounds are learnt where a slice needs them (see `unify`).
* Two symbolic dims that must be equal (operands of one Add, say) are taken to be one; the import then starts again. A
  symbolic dim is never taken for a broadcast 1.
* What cannot be written with core ops becomes an `onnx` node for a provider, with the reason; an operator unknown to
  `onnx` is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto

from vivace.base.dim_notation import parse
from vivace.base.dims import Dim, Expr, Symbol, as_symbol, symbols
from vivace.base.dtypes import DType
from vivace.base.errors import BranchError, GraphError, ModelError, UnsupportedError, VivaceError
from vivace.graph.build import constant
from vivace.graph.graph import Graph, Type, Value, substitute_type
from vivace.graph.ops.shapes import DimMismatch
from vivace.onnx import fallback
from vivace.onnx.call import Call, find
from vivace.onnx.expand import function_body
from vivace.onnx.ops import FAMILIES
from vivace.onnx.reader import Model, label, read
from vivace.onnx.scope import Fallback, Scope, Session, UseBody
from vivace.onnx.tensors import checked_shape, dtype_of
from vivace.onnx.unify import Assumptions, Learnt

Shape = Sequence[int | str | None]
_MAX_STARTS = 200
_STRING_SAFE = frozenset(
    {"Identity", "Shape", "Size", "If", "Loop"}
)  # these move or measure, and never look at the elements
assert FAMILIES  # importing them registers the operators


class Misfit(DimMismatch):
    """A mismatch with the place in the model where it arose."""

    def __init__(self, cause: DimMismatch, paths: tuple[str, ...], where: str) -> None:
        super().__init__(cause.a, cause.b, f"{where}: {cause.where}")
        self.paths = paths


def import_model(source: str | Path | bytes | ModelProto, *, overrides: Mapping[str, Shape] | None = None) -> Graph:
    """The Graph of an ONNX model. `overrides` fixes input shapes by name: sizes, symbols, or None to keep a dim.

    Raises: ModelError for a damaged or inconsistent model, BranchError where only a nested graph is inconsistent,
    UnsupportedError for an operator that nobody knows.
    """
    model = read(source)
    assume = Assumptions()
    for _ in range(_MAX_STARTS):
        try:
            return _import(model, assume, overrides or {})
        except Learnt:
            continue
        except DimMismatch as e:
            if not assume.learn_inside(e.a, e.b, e.paths if isinstance(e, Misfit) else ()):
                kind = BranchError if isinstance(e, Misfit) and e.paths else ModelError
                raise kind(
                    f"its shapes contradict each other: {e.what}", where=e.where, hint="check the model's declared dims"
                ) from e
    raise ModelError(
        "its symbolic dims cannot be made consistent",
        where=model.name,
        hint="fix the sizes of its inputs (shapes=, --shapes)",
    )


def _import(model: Model, assume: Assumptions, overrides: Mapping[str, Shape]) -> Graph:
    session = Session(model, assume)
    scope = Scope(session)
    proto = model.proto.graph
    fixed = initializers(scope, proto, model.name)
    inputs = [v for v in proto.input if v.name not in fixed]
    unknown = set(overrides) - {v.name for v in inputs}
    if unknown:
        raise ModelError(
            f"no input is called {sorted(unknown)[0]!r}", where=model.name, expected=", ".join(v.name for v in inputs)
        )
    names = {d.dim_param.strip() for v in inputs for d in v.type.tensor_type.shape.dim if d.dim_param}
    for v in inputs:
        scope.names[v.name] = x = scope.builder.input(v.name, _input_type(session, v, names, overrides.get(v.name)))
        assume.declared |= {s.name for d in x.shape for s in symbols(d)}
    import_nodes(scope, proto)
    return scope.finish([(v.name, _tensor(scope, v.name, model.name)) for v in proto.output], _identifier(model.name))


def _tensor(scope: Scope, name: str, where: str) -> Value:
    v = scope.lookup(name)
    if not isinstance(v, Value):
        raise UnsupportedError(
            f"the output {name!r} is a {v.kind}",
            where=where,
            expected="tensors",
            hint="export the model with tensor outputs",
        )
    return v


def _identifier(text: str) -> str:
    return "".join(c if c.isalnum() or c == "_" else "_" for c in text) or "main"


def initializers(scope: Scope, proto: GraphProto, where: str) -> set[str]:
    tensors = scope.session.model.tensors
    for t in proto.initializer:
        scope.names[t.name] = constant(tensors.array(t, where), t.name)
    for s in proto.sparse_initializer:
        scope.names[s.values.name] = constant(tensors.sparse(s, where), s.values.name)
    return set(scope.names)


def _input_type(session: Session, v: ValueInfoProto, names: set[str], override: Shape | None) -> Type:
    where = f"input {v.name!r}"
    if not v.type.HasField("tensor_type"):
        kind = v.type.WhichOneof("value") or "value of no type"
        raise UnsupportedError(f"is a {kind.removesuffix('_type').replace('_', ' ')}", where=where, expected="a tensor")
    tensor = v.type.tensor_type
    dtype = dtype_of(tensor.elem_type, where)
    if not tensor.HasField("shape") and override is None:
        raise ModelError(
            "has no declared rank",
            where=where,
            hint=f"give its shape: shapes={{{v.name!r}: (...)}}, --shapes {v.name}:...",
        )
    declared = [_declared(session, d, f"{v.name}_{i}", names) for i, d in enumerate(tensor.shape.dim)]
    if override is not None:
        if tensor.HasField("shape") and len(override) != len(declared):
            raise ModelError(f"is given shape {tuple(override)}", where=where, expected=f"{len(declared)} dims")
        declared = [
            _overridden(session, o, declared[i] if i < len(declared) else None, f"{v.name}_{i}", where)
            for i, o in enumerate(override)
        ]
    shape = tuple(map(session.assume.apply, declared))
    checked_shape([d for d in shape if isinstance(d, int)], dtype, where)
    return Type(dtype, shape)


def _declared(session: Session, d: Any, position: str, names: set[str]) -> Dim:
    if d.HasField("dim_value") and d.dim_value >= 0:
        return int(d.dim_value)
    text = d.dim_param.strip()
    if not text or text == "?" or text.lstrip("-").isdigit():
        return session.assume.symbol(_identifier(position))
    if text.isidentifier():
        return session.assume.symbol(text)
    try:
        expression = parse(text)
    except ModelError:
        return session.assume.symbol(_identifier(text))
    # `batch-size` is a name, `past + sequence` is an expression: its names are dims of the inputs too. A multiple such
    # as `32*rows` is one without: it says all that there is to know of `rows`.
    if {s.name for s in symbols(expression)} <= names or _is_multiple(expression):
        return session.assume.apply(expression)
    return session.assume.symbol(_identifier(text))


def _is_multiple(d: Dim) -> bool:
    """True for a number times one symbol."""
    terms = d.terms if isinstance(d, Expr) else ()
    return len(terms) == 1 and len(terms[0][0]) == 1 and isinstance(terms[0][0][0], Symbol) and terms[0][1] > 1


def _overridden(session: Session, given: int | str | None, declared: Dim | None, position: str, where: str) -> Dim:
    if given is None:
        return session.assume.symbol(_identifier(position)) if declared is None else declared
    wanted = session.assume.apply(parse(given)) if isinstance(given, str) else int(given)
    if isinstance(wanted, int) and wanted < 0:
        raise ModelError(f"is given the size {wanted}", where=where, expected="sizes of at least 0")
    if declared is not None and declared != wanted:
        if not isinstance(declared, Expr) and not isinstance(wanted, Expr):
            raise ModelError(f"is given the size {wanted}", where=where, expected=f"{declared}, as the model declares")
        name = as_symbol(declared)
        if name is not None and isinstance(wanted, int) and session.assume.fix(name, wanted):
            raise Learnt  # every other use of the symbol has this size too
        raise DimMismatch(wanted, declared, where)
    return wanted


def import_nodes(scope: Scope, proto: GraphProto) -> None:
    """Emit the nodes of a graph into a scope."""
    for n in proto.node:
        import_node(scope, n)


def import_node(scope: Scope, n: NodeProto) -> None:
    model = scope.session.model
    domain = "" if n.domain == "ai.onnx" else n.domain
    where = f"{model.name} node {label(n)!r} ({n.op_type})"
    outer_origin, scope.builder.origin = scope.builder.origin, scope.builder.origin or (label(n),)
    inputs = [scope.lookup(i) if i else None for i in n.input]
    mark = len(scope.builder.nodes)
    try:
        results = _apply(scope, n, domain, inputs, where)
    except Fallback as e:
        scope.discard(mark)
        results = fallback.emit(scope, n, inputs, e.reason, where)
    except Misfit:
        raise
    except DimMismatch as e:
        raise Misfit(e, scope.paths, where) from e
    except GraphError as e:
        raise ModelError(e.what, where=f"{where}: {e.where}", expected=str(e.expected)) from e
    except VivaceError as e:
        if model.name in e.where:
            raise
        raise type(e)(e.what, where=f"{where}: {e.where}", expected=e.expected, hint=e.hint) from e
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as e:
        what = f"its attributes or operands make no sense ({type(e).__name__}: {str(e)[:200]})"
        raise ModelError(
            what, where=where, hint="check the model with onnx.checker, and report it if it is valid"
        ) from e
    finally:
        scope.builder.origin = outer_origin
    for name, v in zip(n.output, results):
        if name:
            scope.define(name, v, mark)


def _apply(scope: Scope, n: NodeProto, domain: str, inputs: list[Any], where: str) -> tuple[Any, ...]:
    if any(i is not None and not isinstance(i, Value) for i in inputs):
        raise Fallback("it works on a value that no tensor type describes")
    if any(i is not None and i.dtype is DType.string for i in inputs) and n.op_type not in _STRING_SAFE:
        raise Fallback("it works on strings")
    opset = scope.session.model.opsets[domain]
    function = find(domain, n.op_type, opset)
    mark = len(scope.builder.nodes)
    if function is not None:
        try:
            result = function(Call(scope, n, opset, where), *inputs)
            return result if isinstance(result, tuple) else (result,)
        except UseBody:
            scope.discard(mark)
    body = function_body(n, domain, scope.session.model.opsets, inputs)
    if body is None:
        raise Fallback("it is not written with core ops")
    try:
        return _inline(scope, n, body, inputs)
    except Misfit as e:
        if not scope.session.assume.copy().learn_inside(e.a, e.b, e.paths):
            raise Fallback("the body that defines it does not say which of its open sizes are equal") from e
        raise


def _inline(scope: Scope, n: NodeProto, body: GraphProto, inputs: list[Any]) -> tuple[Any, ...]:
    """Import the body of an operator that `onnx` defines as a function: its names live in a frame of their own."""
    outer, scope.names = scope.names, {}
    try:
        scope.names |= {v.name: x for v, x in zip_longest(body.input, inputs)}
        import_nodes(scope, body)
        return tuple(scope.names.get(v.name) for v in body.output)  # an optional output may stay undefined
    finally:
        scope.names = outer


def import_inline(scope: Scope, proto: GraphProto) -> tuple[Any, ...]:
    """Import a branch in place: it sees the names of the scope, its own names do not stay."""
    outer = scope.names
    scope.names = dict(outer)
    try:
        initializers(scope, proto, "branch")
        import_nodes(scope, proto)
        return tuple(scope.lookup(v.name) for v in proto.output)
    finally:
        scope.names = outer


def import_subgraph(
    scope: Scope, proto: GraphProto, types: Sequence[Type], where: str, path: str
) -> tuple[Scope, list[Value]]:
    """Import a nested graph whose own inputs have the given types; returns its scope and outputs, not yet finished."""
    inner = Scope(scope.session, scope, path)
    initializers(inner, proto, where)
    for v, t in zip(proto.input, types, strict=True):
        inner.names[v.name] = inner.builder.input(v.name, substitute_type(t, inner.refined))
    import_nodes(inner, proto)
    outputs = [inner.lookup(v.name) for v in proto.output]
    for v, x in zip(proto.output, outputs):
        if not isinstance(x, Value):
            raise Fallback(f"its graph gives {v.name!r}, which is not a tensor")
    return inner, outputs
