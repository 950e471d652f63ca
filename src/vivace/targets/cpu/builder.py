"""Writes one LLVM function as text, instruction by instruction, already hoisted and without repetitions.

A function is a stack of *scopes*: the entry, then the open loops and branches. Every `Value` knows the scope that it
was computed in (its level). An instruction is placed in the innermost scope that one of its operands comes from, not
where the generator stands, so that whatever is invariant in a loop stands before it; and the same instruction on the
same operands is written once per scope. LLVM then needs few passes, which is most of what compiling costs.

Rules:
* SPECULATE: instructions are placed in outer scopes, where they run although the inner scope may not. So none may trap:
  integer divisors are made non-zero by the caller. Loads are placed by `load`, which knows when that is safe.
* TEXT: a child scope's text is appended to its parent when it closes; the parent's guard comes between.
* LANES: `lanes` 0 is a scalar. Scalars combine with vectors by broadcasting.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vivace.base.machine import Isa
from vivace.targets.cpu.isa import kernel_attributes

_BITS = {"float": 32, "double": 64, "half": 16, "i1": 1, "i8": 8, "i16": 16, "i32": 32, "i64": 64, "ptr": 64}
_SUFFIX = {"float": "f32", "double": "f64", "half": "f16", "ptr": "p0"}
KERNEL_PARAMETERS = "ptr noalias %args, i64 %begin, i64 %end, ptr noalias %scratch"


class Value(NamedTuple):
    """An LLVM value: its name or literal, element type, lanes (0: scalar) and the level of the scope it belongs to."""

    text: str
    type: str
    lanes: int = 0
    level: int = 0
    const: int | float | None = None

    @property
    def full(self) -> str:
        """The LLVM type."""
        return f"<{self.lanes} x {self.type}>" if self.lanes else self.type

    @property
    def bits(self) -> int:
        """Bits of one element."""
        return _BITS[self.type]

    def __str__(self) -> str:
        return f"{self.full} {self.text}"


def type_bits(t: str) -> int:
    """Bits of an LLVM element type."""
    return _BITS[t]


def type_text(t: str, lanes: int) -> str:
    return f"<{lanes} x {t}>" if lanes else t


def literal(value: int | float, t: str, lanes: int = 0) -> Value:
    """A constant; float literals are written as bits, so that nothing is rounded twice."""
    if t in ("float", "double"):
        if t == "float":
            try:
                value = struct.unpack("<f", struct.pack("<f", value))[0]
            except OverflowError:
                value = float("inf") if value > 0 else float("-inf")
        value = float(value)
        text = f"0x{struct.unpack('<Q', struct.pack('<d', value))[0]:016X}"
    elif t == "i1":
        text = "true" if value else "false"
    else:
        bits = _BITS[t]
        value = int(value) & ((1 << bits) - 1)
        if value >> (bits - 1):
            value -= 1 << bits
        text = str(value)
    if lanes:
        text = f"splat ({t} {text})"
    return Value(text, t, lanes, 0, value)


class _Scope:
    """`pre` runs once if the scope is entered, `lines` in every iteration. `certain`: entered whenever the parent
    runs."""

    __slots__ = ("certain", "is_loop", "label", "lines", "pre", "seen", "seen_pre")

    def __init__(self, label: str, is_loop: bool, certain: bool) -> None:
        self.label, self.is_loop, self.certain = label, is_loop, certain
        self.lines: list[str] = []
        self.pre: list[str] = []
        self.seen: dict[str, Value] = {}
        self.seen_pre: dict[str, Value] = {}


class Builder:
    """The function under construction."""

    def __init__(self, name: str, isa: Isa, parameters: str = KERNEL_PARAMETERS) -> None:
        self.name, self.isa, self._parameters = name, isa, parameters
        self._scopes = [_Scope("entry", False, True)]
        self._count = 0
        self._floor = 0
        self._declared: dict[str, str] = {}
        self._globals: dict[str, str] = {}

    # --- text -----------------------------------------------------------------------------------------------------

    @property
    def level(self) -> int:
        """The level of the innermost open scope."""
        return len(self._scopes) - 1

    def fresh(self) -> str:
        self._count += 1
        return f"%v{self._count}"

    def _label(self) -> str:
        self._count += 1
        return f"b{self._count}"

    def line(self, text: str) -> None:
        """A line in the innermost scope, as it is."""
        self._scopes[-1].lines.append(text)

    def inst(self, text: str, t: str, lanes: int, *operands: Value, here: bool = False) -> Value:
        """The result of an instruction without effects; `here` keeps it in the innermost scope."""
        level = self.level if here else max([v.level for v in operands], default=0)
        level = max(level, self._floor)
        scope = self._scopes[level]
        found = scope.seen.get(text)
        if found is None:
            name = self.fresh()
            scope.lines.append(f"  {name} = {text}")
            found = scope.seen[text] = Value(name, t, lanes, level)
        return found

    def effect(self, text: str, t: str = "", lanes: int = 0) -> Value:
        """An instruction with an effect, in the innermost scope, never shared."""
        if not t:
            self.line("  " + text)
            return Value("", "void")
        name = self.fresh()
        self.line(f"  {name} = {text}")
        return Value(name, t, lanes, self.level)

    def declare(self, signature: str, name: str) -> None:
        self._declared.setdefault(name, f"declare {signature}")

    def global_constant(self, key: str, definition: str) -> Value:
        """The address of constant data; `definition` is `[n x type] [...]`."""
        self._globals.setdefault(key, f"@{key} = private unnamed_addr constant {definition}, align 64")
        return Value(f"@{key}", "ptr")

    def continue_from(self, label: str) -> None:
        """What is written follows code that another generator wrote, whose last block is `label`."""
        self._scopes[0].label = label

    def fragment(self) -> tuple[list[str], str, dict[str, str]]:
        """The lines so far, to be put into a function, their last block, and the module's lines that they need."""
        return self._scopes[0].lines, self._scopes[0].label, {**self._globals, **self._declared}

    def finish(self) -> str:
        """The module."""
        self.line("  ret void")
        head = f"define void @{self.name}({self._parameters}) #0 {{\nentry:\n"
        parts = [*self._globals.values(), *self._declared.values(), head + "\n".join(self._scopes[0].lines) + "\n}"]
        return "\n".join(parts) + f"\nattributes #0 = {{ {kernel_attributes(self.isa)} }}\n!0 = !{{}}\n"

    # --- scopes ---------------------------------------------------------------------------------------------------

    def loop(
        self,
        start: Value,
        stop: Value,
        step: int,
        body: Callable[[Value, list[Value]], Sequence[Value]],
        carried: Sequence[Value] = (),
    ) -> list[Value]:
        """`for (i = start; i < stop; i += step)`; `body(i, carried)` gives the carried values of the next iteration."""
        static = isinstance(start.const, int) and isinstance(stop.const, int)
        if static:
            n = -(-(stop.const - start.const) // step)  # type: ignore[operator]
            if n <= 0:
                return list(carried)
            if n == 1:
                return list(body(start, list(carried)))
        parent, before, top, after = self._scopes[-1], self._label(), self._label(), self._label()
        scope = _Scope(top, True, static)
        self._scopes.append(scope)
        level = self.level
        i = Value(self.fresh(), "i64", 0, level)
        inner = [Value(self.fresh(), c.type, c.lanes, level) for c in carried]
        following = list(body(i, inner))
        next_i = self.fresh()
        scope.lines.append(f"  {next_i} = add nsw i64 {i.text}, {step}")
        more = self.fresh()
        scope.lines.append(f"  {more} = icmp slt i64 {next_i}, {stop.text}")
        scope.lines.append(f"  br i1 {more}, label %{top}, label %{after}")
        self._scopes.pop()
        if static:
            parent.lines.append(f"  br label %{before}")
        else:
            enter = self.fresh()
            parent.lines.append(f"  {enter} = icmp slt i64 {start.text}, {stop.text}")
            parent.lines.append(f"  br i1 {enter}, label %{before}, label %{after}")
        parent.lines.append(f"{before}:")
        parent.lines.extend(scope.pre)
        parent.lines += [f"  br label %{top}", f"{top}:"]
        parent.lines.append(f"  {i.text} = phi i64 [ {start.text}, %{before} ], [ {next_i}, %{scope.label} ]")
        for c, x, y in zip(inner, carried, following):
            parent.lines.append(f"  {c.text} = phi {c.full} [ {x.text}, %{before} ], [ {y.text}, %{scope.label} ]")
        parent.lines.extend(scope.lines)
        parent.lines.append(f"{after}:")
        results = []
        for x, y in zip(carried, following):
            name = self.fresh()
            entering = "" if static else f"[ {x.text}, %{parent.label} ], "
            parent.lines.append(f"  {name} = phi {x.full} {entering}[ {y.text}, %{scope.label} ]")
            results.append(Value(name, x.type, x.lanes, self.level))
        parent.label = after
        return results

    def branch(
        self, cond: Value, body: Callable[[], Sequence[Value]], otherwise: Sequence[Value] = (), is_rare: bool = False
    ) -> list[Value]:
        """`if (cond) values = body()`, else the values are `otherwise`. Nothing is moved out of a rare branch."""
        parent, top, after = self._scopes[-1], self._label(), self._label()
        scope, floor = _Scope(top, False, False), self._floor
        self._scopes.append(scope)
        if is_rare:
            self._floor = self.level
        values = list(body())
        self._floor = floor
        self._scopes.pop()
        parent.lines += [f"  br i1 {cond.text}, label %{top}, label %{after}", f"{top}:"]
        parent.lines.extend(scope.lines)
        parent.lines += [f"  br label %{after}", f"{after}:"]
        results = []
        for x, y in zip(otherwise, values):
            name = self.fresh()
            parent.lines.append(f"  {name} = phi {x.full} [ {x.text}, %{parent.label} ], [ {y.text}, %{scope.label} ]")
            results.append(Value(name, x.type, x.lanes, self.level))
        parent.label = after
        return results

    def hoisted(self, text: str, t: str, lanes: int, *operands: Value) -> Value:
        """A load of memory that nothing in this function writes: placed before every loop in which it is invariant,
        but only where the loop would have run it at least once."""
        lowest, k = max([v.level for v in operands], default=0), self.level
        place: _Scope | None = None
        level = k
        while k > lowest and self._scopes[k].is_loop:
            place = self._scopes[k]
            level = k
            if not place.certain:
                break
            k -= 1
        if place is None:
            return self.inst(text, t, lanes, *operands, here=True)
        if k == lowest:  # certain to run: in the body of the scope below
            scope = self._scopes[k]
            lines, seen, level = scope.lines, scope.seen, k
        else:
            lines, seen = place.pre, place.seen_pre
        found = seen.get(text)
        if found is None:
            name = self.fresh()
            lines.append(f"  {name} = {text}")
            found = seen[text] = Value(name, t, lanes, level)
        return found

    # --- arithmetic -----------------------------------------------------------------------------------------------

    def const(self, value: int | float, t: str, lanes: int = 0) -> Value:
        return literal(value, t, lanes)

    def widen(self, v: Value, lanes: int) -> Value:
        """Broadcast a scalar to a vector."""
        if v.lanes == lanes:
            return v
        assert v.lanes == 0, f"{v} cannot become {lanes} lanes"
        if v.const is not None:
            return literal(v.const, v.type, lanes)
        full = type_text(v.type, lanes)
        one = self.inst(f"insertelement {full} poison, {v}, i64 0", v.type, lanes, v)
        return self.inst(f"shufflevector {one}, {full} poison, <{lanes} x i32> zeroinitializer", v.type, lanes, one)

    def match(self, *values: Value) -> list[Value]:
        """The values with equal lanes."""
        lanes = max(v.lanes for v in values)
        return [self.widen(v, lanes) for v in values]

    def op(self, opcode: str, a: Value, b: Value) -> Value:
        """A binary instruction."""
        a, b = self.match(a, b)
        return self.inst(f"{opcode} {a}, {b.text}", a.type, a.lanes, a, b)

    def compare(self, opcode: str, a: Value, b: Value) -> Value:
        """`icmp ..` or `fcmp ..`."""
        a, b = self.match(a, b)
        return self.inst(f"{opcode} {a}, {b.text}", "i1", a.lanes, a, b)

    def select(self, cond: Value, a: Value, b: Value) -> Value:
        if cond.lanes == 0:
            a, b = self.match(a, b)
        else:
            cond, a, b = self.match(cond, a, b)
        return self.inst(f"select {cond}, {a}, {b}", a.type, a.lanes, cond, a, b)

    def convert(self, opcode: str, v: Value, t: str) -> Value:
        """A conversion instruction such as `zext`, `fptosi`."""
        return self.inst(f"{opcode} {v} to {type_text(t, v.lanes)}", t, v.lanes, v)

    def bitcast(self, v: Value, t: str) -> Value:
        return self.convert("bitcast", v, t)

    def call(self, name: str, *values: Value, t: str = "", suffix: bool = True) -> Value:
        """An LLVM intrinsic that is overloaded on its first operand, such as `llvm.fma`."""
        args = self.match(*values)
        first = args[0]
        t = t or first.type
        if suffix:
            kind = _SUFFIX.get(first.type, first.type)
            name += f".v{first.lanes}{kind}" if first.lanes else f".{kind}"
        lanes = 0 if "reduce" in name else first.lanes
        full = type_text(t, lanes)
        self.declare(f"{full} @{name}({', '.join(a.full for a in args)})", name)
        return self.inst(f"call {full} @{name}({', '.join(map(str, args))})", t, lanes, *args)

    def fneg(self, v: Value) -> Value:
        return self.inst(f"fneg {v}", v.type, v.lanes, v)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a*b + c, with one rounding where the instruction set has it."""
        return self.call("llvm.fma" if self.isa.has_fma else "llvm.fmuladd", a, b, c)

    def lookup(self, table: Value, index: Value, t: str) -> Value:
        """Elements of constant data."""
        n = index.lanes
        p = self.inst(f"getelementptr {t}, {table}, {index}", "ptr", n, table, index)
        if not n:
            return self.inst(f"load {t}, {p}", t, 0, p)
        full, name = type_text(t, n), f"llvm.masked.gather.v{n}{_SUFFIX.get(t, t)}.v{n}p0"
        self.declare(f"{full} @{name}(<{n} x ptr>, <{n} x i1>, {full})", name)
        mask = f"<{n} x i1> splat (i1 true)"
        return self.inst(
            f"call {full} @{name}(<{n} x ptr> align {_BITS[t] // 8} {p.text}, {mask}, {full} poison)", t, n, p
        )

    def per_part(self, width: int, emit: Callable[..., Value], *values: Value) -> Value:
        """Apply an instruction that exists for `width` lanes only to values of a multiple of it."""
        lanes = values[0].lanes
        if lanes == width:
            return emit(*values)
        parts = [emit(*(self.part(v, k, width) for v in values)) for k in range(0, lanes, width)]
        while len(parts) > 1:
            parts = [self._joined(x, y) for x, y in zip(parts[::2], parts[1::2])]
        return parts[0]

    def part(self, v: Value, start: int, width: int) -> Value:
        """Consecutive lanes of a vector."""
        order = ", ".join(f"i32 {start + k}" for k in range(width))
        return self.inst(f"shufflevector {v}, {v.full} poison, <{width} x i32> <{order}>", v.type, width, v)

    def _joined(self, x: Value, y: Value) -> Value:
        n = x.lanes * 2
        order = ", ".join(f"i32 {k}" for k in range(n))
        return self.inst(f"shufflevector {x}, {y}, <{n} x i32> <{order}>", x.type, n, x, y)

    def lane_numbers(self, lanes: int, t: str, factor: int = 1) -> Value:
        """The constant vector 0, factor, 2*factor, ..."""
        return Value("<" + ", ".join(f"{t} {k * factor}" for k in range(lanes)) + ">", t, lanes)

    # --- 64-bit index arithmetic ----------------------------------------------------------------------------------

    def iadd(self, a: Value, b: Value) -> Value:
        if isinstance(a.const, int) and isinstance(b.const, int):
            return literal(a.const + b.const, a.type, max(a.lanes, b.lanes))
        if a.const == 0:
            return b if b.lanes >= a.lanes else self.widen(b, a.lanes)
        if b.const == 0:
            return a if a.lanes >= b.lanes else self.widen(a, b.lanes)
        return self.op("add nsw", a, b)

    def imul(self, a: Value, b: Value) -> Value:
        if isinstance(a.const, int) and isinstance(b.const, int):
            return literal(a.const * b.const, a.type, max(a.lanes, b.lanes))
        for x, y in ((a, b), (b, a)):
            if x.const == 1 and y.lanes >= x.lanes:
                return y
        return self.op("mul nsw", a, b)
