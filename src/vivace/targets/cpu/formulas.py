"""Many dims as one table of values and a list of instructions, which native code evaluates in a pass.

    formulas = formulas_of([2 * n + 1, floordiv(n, 4)])
    formulas.names          ("n",): the first places of the table are theirs, for the caller to write
    formulas.results        for each dim given, the place of its value

The table holds the values of symbols, then those of the instructions, in order, then constants. An instruction is four
32-bit numbers: what to do, and the places of three values. What dims have in common is computed once.

Rules:
* STATUS: an evaluation tells of a value that 64 bits do not hold, and of a divisor that is zero (`Trouble`). It goes on
  after either, with values that mean nothing.
* FLOOR: division and remainder are those of Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from vivace.base.dims import Apply, Atom, Dim, Expr, Symbol, symbols

Words = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.int32]


class Op(IntEnum):
    """What an instruction makes of the values a, b, c."""

    MULTIPLY_ADD = 0  # a * b + c
    FLOORDIV = 1  # a // b
    MOD = 2
    MIN = 3
    MAX = 4


_OPS = {"//": Op.FLOORDIV, "%": Op.MOD, "min": Op.MIN, "max": Op.MAX}


class Trouble(IntEnum):
    """Bits of the status of an evaluation (rule STATUS)."""

    OVERFLOW = 1
    ZERO_DIVISOR = 2


class Frame(IntEnum):
    """Words that tell native code where an evaluation, and the filling of a program (`words`), find what they need."""

    CODE = 0
    CODE_END = 1
    VALUES = 2
    FIRST = 3  # the address of the first instruction's value
    PROGRAM = 4  # the words of a context
    PLACES = 5
    N_IN_ARENA = 6
    N_PLACES = 7
    ARENA = 8
    PARTS = 9
    N_PARTS = 10
    SIZE = 11


@dataclass(frozen=True, slots=True)
class Formulas:
    """Instructions, and the table of values as it begins; it is copied for each who evaluates."""

    names: tuple[str, ...]
    code: Numbers
    values: Words
    results: Words

    def frame(self, values: Words) -> Words:
        """What native code is told to evaluate these in a table; the caller keeps both alive."""
        frame = np.zeros(Frame.SIZE, np.int64)
        frame[Frame.CODE] = self.code.ctypes.data
        frame[Frame.CODE_END] = self.code.ctypes.data + self.code.nbytes
        frame[Frame.VALUES] = values.ctypes.data
        frame[Frame.FIRST] = values.ctypes.data + 8 * len(self.names)
        return frame


def formulas_of(dims: Sequence[Dim], first: Sequence[str] = ()) -> Formulas:
    """The formulas of dims. The symbols named `first` come first, in their order; then the others, sorted."""
    distinct = dict.fromkeys(dims)
    others = {s.name for d in distinct for s in symbols(d)} - set(first)
    names = (*first, *sorted(others))
    w = _Writer(dict(zip(names, range(len(names)))))
    found = {d: w.dim(d) for d in distinct}
    n = len(names) + len(w.code)

    def place(p: int) -> int:
        return n + ~p if p < 0 else p

    code = [(op, place(a), place(b), place(c)) for op, a, b, c in w.code]
    values = np.zeros(n + len(w.constants), np.int64)
    values[n:] = list(w.constants)
    return Formulas(
        names, np.array(code, np.int32).reshape(-1, 4), values, np.array([place(found[d]) for d in dims], np.int64)
    )


@dataclass(slots=True)
class _Writer:
    """Writes instructions; the place of constant number i is `~i` until the number of instructions is known."""

    symbols: dict[str, int]
    code: dict[tuple[int, int, int, int], int] = field(default_factory=dict)
    constants: dict[int, int] = field(default_factory=dict)

    def constant(self, value: int) -> int:
        return ~self.constants.setdefault(value, len(self.constants))

    def op(self, op: Op, a: int, b: int, c: int) -> int:
        return self.code.setdefault((op, a, b, c), len(self.symbols) + len(self.code))

    def dim(self, d: Dim) -> int:
        if not isinstance(d, Expr):
            return self.constant(int(d))
        zero = total = self.constant(0)
        for atoms, c in reversed(d.terms):
            if not atoms:
                total = self.constant(c)
                continue
            first, *factors = map(self.atom, atoms)
            if c != 1 or (not factors and total != zero):
                factors.append(self.constant(c))
            for factor in factors[:-1]:
                first = self.op(Op.MULTIPLY_ADD, first, factor, zero)
            total = self.op(Op.MULTIPLY_ADD, first, factors[-1], total) if factors else first
        return total

    def atom(self, atom: Atom) -> int:
        if isinstance(atom, Symbol):
            return self.symbols[atom.name]
        assert isinstance(atom, Apply)
        return self.op(_OPS[atom.fn], self.dim(atom.a), self.dim(atom.b), self.constant(0))


def _word(name: str, at: Frame, kind: str = "ptr") -> str:
    return f"  %{name}.p = getelementptr i64, ptr %frame, i64 {at:d}\n  %{name} = load {kind}, ptr %{name}.p"


FORMULAS = f"""
declare {{i64, i1}} @llvm.smul.with.overflow.i64(i64, i64)
declare {{i64, i1}} @llvm.sadd.with.overflow.i64(i64, i64)
declare i64 @llvm.smin.i64(i64, i64)
declare i64 @llvm.smax.i64(i64, i64)

define internal i64 @floordiv(i64 %a, i64 %b) alwaysinline {{
  %q = sdiv i64 %a, %b
  %r = srem i64 %a, %b
  %uneven = icmp ne i64 %r, 0
  %signs = xor i64 %r, %b
  %apart = icmp slt i64 %signs, 0
  %lower = and i1 %uneven, %apart
  %one = zext i1 %lower to i64
  %floor = sub i64 %q, %one
  ret i64 %floor
}}

; Evaluates the formulas of a frame; returns the bits of `Trouble`.
define internal i64 @evaluate(ptr %frame) {{
entry:
{_word("code", Frame.CODE)}
{_word("end", Frame.CODE_END)}
{_word("values", Frame.VALUES)}
{_word("first", Frame.FIRST)}
  br label %test
test:
  %at = phi ptr [%code, %entry], [%at.next, %store]
  %out = phi ptr [%first, %entry], [%out.next, %store]
  %bad = phi i64 [0, %entry], [%bad.next, %store]
  %done = icmp eq ptr %at, %end
  br i1 %done, label %answer, label %one
one:
  %op = load i32, ptr %at
  %a.n.p = getelementptr i32, ptr %at, i64 1
  %a.n = load i32, ptr %a.n.p
  %a.p = getelementptr i64, ptr %values, i32 %a.n
  %a = load i64, ptr %a.p
  %b.n.p = getelementptr i32, ptr %at, i64 2
  %b.n = load i32, ptr %b.n.p
  %b.p = getelementptr i64, ptr %values, i32 %b.n
  %b = load i64, ptr %b.p
  switch i32 %op, label %divide [
    i32 {Op.MULTIPLY_ADD:d}, label %multiply.add
    i32 {Op.MIN:d}, label %min
    i32 {Op.MAX:d}, label %max ]
multiply.add:
  %c.n.p = getelementptr i32, ptr %at, i64 3
  %c.n = load i32, ptr %c.n.p
  %c.p = getelementptr i64, ptr %values, i32 %c.n
  %c = load i64, ptr %c.p
  %ab = call {{i64, i1}} @llvm.smul.with.overflow.i64(i64 %a, i64 %b)
  %product = extractvalue {{i64, i1}} %ab, 0
  %abc = call {{i64, i1}} @llvm.sadd.with.overflow.i64(i64 %product, i64 %c)
  %sum = extractvalue {{i64, i1}} %abc, 0
  %over.1 = extractvalue {{i64, i1}} %ab, 1
  %over.2 = extractvalue {{i64, i1}} %abc, 1
  %over = or i1 %over.1, %over.2
  %over.bit = select i1 %over, i64 {Trouble.OVERFLOW:d}, i64 0
  br label %store
min:
  %least = call i64 @llvm.smin.i64(i64 %a, i64 %b)
  br label %store
max:
  %most = call i64 @llvm.smax.i64(i64 %a, i64 %b)
  br label %store
divide:
  %is.zero = icmp eq i64 %b, 0
  %is.minus = icmp eq i64 %b, -1
  %is.least = icmp eq i64 %a, {-(2**63)}
  %is.huge = and i1 %is.minus, %is.least
  %traps = or i1 %is.zero, %is.huge
  %divisor = select i1 %traps, i64 1, i64 %b
  %quotient = call i64 @floordiv(i64 %a, i64 %divisor)
  %whole = mul i64 %quotient, %divisor
  %rest = sub i64 %a, %whole
  %is.mod = icmp eq i32 %op, {Op.MOD:d}
  %divided = select i1 %is.mod, i64 %rest, i64 %quotient
  %zero.bit = select i1 %is.zero, i64 {Trouble.ZERO_DIVISOR:d}, i64 0
  %trap.bit = select i1 %is.huge, i64 {Trouble.OVERFLOW:d}, i64 %zero.bit
  br label %store
store:
  %value = phi i64 [%sum, %multiply.add], [%least, %min], [%most, %max], [%divided, %divide]
  %bit = phi i64 [%over.bit, %multiply.add], [0, %min], [0, %max], [%trap.bit, %divide]
  store i64 %value, ptr %out
  %bad.next = or i64 %bad, %bit
  %at.next = getelementptr i32, ptr %at, i64 4
  %out.next = getelementptr i64, ptr %out, i64 1
  br label %test
answer:
  ret i64 %bad
}}

; Writes the values of a frame into the words of its program, and shares units out in grains (`words.Layout`).
; Returns 0.
define internal i64 @fill(ptr %frame) {{
entry:
{_word("values", Frame.VALUES)}
{_word("program", Frame.PROGRAM)}
{_word("places", Frame.PLACES)}
{_word("n_in_arena", Frame.N_IN_ARENA, "i64")}
{_word("n_places", Frame.N_PLACES, "i64")}
{_word("arena", Frame.ARENA, "i64")}
{_word("parts", Frame.PARTS)}
{_word("n_parts", Frame.N_PARTS, "i64")}
  br label %places.test
places.test:
  %i = phi i64 [0, %entry], [%i.next, %place]
  %is.filled = icmp eq i64 %i, %n_places
  br i1 %is.filled, label %parts.test, label %place
place:
  %pair = getelementptr [2 x i32], ptr %places, i64 %i
  %to = load i32, ptr %pair
  %from.p = getelementptr i32, ptr %pair, i64 1
  %from = load i32, ptr %from.p
  %value.p = getelementptr i64, ptr %values, i32 %from
  %value = load i64, ptr %value.p
  %is.in.arena = icmp slt i64 %i, %n_in_arena
  %base = select i1 %is.in.arena, i64 %arena, i64 0
  %word = add i64 %value, %base
  %word.p = getelementptr i64, ptr %program, i32 %to
  store i64 %word, ptr %word.p
  %i.next = add i64 %i, 1
  br label %places.test
parts.test:
  %k = phi i64 [0, %places.test], [%k.next, %part]
  %last.head = phi i32 [-1, %places.test], [%head, %part]
  %last.end = phi i64 [0, %places.test], [%ends, %part]
  %is.shared = icmp eq i64 %k, %n_parts
  br i1 %is.shared, label %finish, label %part
part:
  %row = getelementptr [5 x i32], ptr %parts, i64 %k
  %at = load i32, ptr %row
  %head.p = getelementptr i32, ptr %row, i64 1
  %head = load i32, ptr %head.p
  %units.n.p = getelementptr i32, ptr %row, i64 2
  %units.n = load i32, ptr %units.n.p
  %units.p = getelementptr i64, ptr %values, i32 %units.n
  %units = load i64, ptr %units.p
  %grain.n.p = getelementptr i32, ptr %row, i64 3
  %grain.n = load i32, ptr %grain.n.p
  %grain.p = getelementptr i64, ptr %values, i32 %grain.n
  %wanted = load i64, ptr %grain.p
  %most.p = getelementptr i32, ptr %row, i64 4
  %most.4 = load i32, ptr %most.p
  %most = sext i32 %most.4 to i64
  %minus.units = sub i64 0, %units
  %minus.least = call i64 @floordiv(i64 %minus.units, i64 %most)
  %least = sub i64 0, %minus.least
  %some = call i64 @llvm.smax.i64(i64 %wanted, i64 1)
  %grain = call i64 @llvm.smax.i64(i64 %some, i64 %least)
  %minus.grains = call i64 @floordiv(i64 %minus.units, i64 %grain)
  %is.same = icmp eq i32 %head, %last.head
  %before = select i1 %is.same, i64 %last.end, i64 0
  %ends = sub i64 %before, %minus.grains
  %part.p = getelementptr i64, ptr %program, i32 %at
  %part.grain = getelementptr i64, ptr %part.p, i64 3
  store i64 %grain, ptr %part.grain
  %part.end = getelementptr i64, ptr %part.p, i64 4
  store i64 %ends, ptr %part.end
  %head.at = getelementptr i64, ptr %program, i32 %head
  %total = getelementptr i64, ptr %head.at, i64 2
  store i64 %ends, ptr %total
  %k.next = add i64 %k, 1
  br label %parts.test
finish:
  ret i64 0
}}
"""
