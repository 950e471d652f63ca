"""A writer of LLVM text for the contraction generators: numbered values, blocks, loops, integer arithmetic that folds.

An integer value is an `int` (an immediate) or the text of an i64 register; `add`, `mul` and the others fold
immediates, so that code for static dims carries no arithmetic. Pointers are opaque `ptr`; offsets are in bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from vivace.base.dims import Apply, Dim, Expr, Symbol, bounds

Int = int | str


@dataclass(slots=True)
class Text:
    """One function under construction. `block` is the label of the current basic block."""

    lines: list[str] = field(default_factory=list)
    declares: dict[str, str] = field(default_factory=dict)
    block: str = "entry"
    count: int = 0

    def fresh(self) -> str:
        self.count += 1
        return f"%t{self.count}"

    def label(self) -> str:
        self.count += 1
        return f"t{self.count}"

    def put(self, line: str) -> None:
        self.lines.append("  " + line)

    def op(self, text: str) -> str:
        """Appends an instruction with a result."""
        name = self.fresh()
        self.lines.append(f"  {name} = {text}")
        return name

    def start(self, label: str) -> None:
        self.block = label
        self.lines.append(f"{label}:")

    def jump(self, label: str) -> None:
        self.put(f"br label %{label}")

    def branch(self, cond: str, then: str, other: str) -> None:
        self.put(f"br i1 {cond}, label %{then}, label %{other}")

    def declare(self, name: str, signature: str) -> None:
        self.declares[name] = f"declare {signature}"

    # integers

    def add(self, a: Int, b: Int) -> Int:
        if isinstance(a, int) and isinstance(b, int):
            return a + b
        if a == 0:
            return b
        if b == 0:
            return a
        return self.op(f"add nsw i64 {a}, {b}")

    def sub(self, a: Int, b: Int) -> Int:
        if isinstance(a, int) and isinstance(b, int):
            return a - b
        return a if b == 0 else self.op(f"sub nsw i64 {a}, {b}")

    def mul(self, a: Int, b: Int) -> Int:
        if isinstance(a, int) and isinstance(b, int):
            return a * b
        if a == 0 or b == 0:
            return 0
        if a == 1:
            return b
        if b == 1:
            return a
        return self.op(f"mul nsw i64 {a}, {b}")

    def divmod(self, a: Int, b: Int) -> tuple[Int, Int]:
        """Quotient and remainder of non-negative integers."""
        if isinstance(a, int) and isinstance(b, int):
            return divmod(a, b)
        if b == 1:
            return a, 0
        q = self.op(f"udiv i64 {a}, {b}")
        return q, self.sub(a, self.mul(q, b))

    def floor_divmod(self, a: Int, b: Int) -> tuple[Int, Int]:
        """Python's quotient and remainder of any integer by a positive one: sizes that divide leave a division when
        dims are simplified, and what stays in it may be negative.
        """
        if isinstance(a, int) and isinstance(b, int):
            return divmod(a, b)
        if b == 1:
            return a, 0
        towards_zero = self.op(f"sdiv i64 {a}, {b}")
        rest = self.sub(a, self.mul(towards_zero, b))
        borrow = self.op(f"ashr i64 {rest}, 63")
        q = self.add(towards_zero, borrow)
        return q, self.sub(a, self.mul(q, b))

    def minimum(self, a: Int, b: Int) -> Int:
        if isinstance(a, int) and isinstance(b, int):
            return min(a, b)
        self.declare("llvm.smin.i64", "i64 @llvm.smin.i64(i64, i64)")
        return self.op(f"call i64 @llvm.smin.i64(i64 {a}, i64 {b})")

    def maximum(self, a: Int, b: Int) -> Int:
        if isinstance(a, int) and isinstance(b, int):
            return max(a, b)
        self.declare("llvm.smax.i64", "i64 @llvm.smax.i64(i64, i64)")
        return self.op(f"call i64 @llvm.smax.i64(i64 {a}, i64 {b})")

    def less(self, a: Int, b: Int) -> str:
        return self.op(f"icmp slt i64 {a}, {b}")

    def dim(self, d: Dim, env: Mapping[str, Int]) -> Int:
        """The value of a dim; every symbol must be in `env`."""
        if not isinstance(d, Expr):
            return int(d)
        total: Int = 0
        for monomial, coefficient in d.terms:
            term: Int = coefficient
            for atom in monomial:
                term = self.mul(term, self._atom(atom, env))
            total = self.add(total, term)
        return total

    def _atom(self, atom: Symbol | Apply, env: Mapping[str, Int]) -> Int:
        if isinstance(atom, Symbol):
            return env[atom.name]
        a, b = self.dim(atom.a, env), self.dim(atom.b, env)
        least = bounds(atom.a)[0]
        divide = self.divmod if least is not None and least >= 0 else self.floor_divmod
        match atom.fn:
            case "//":
                return divide(a, b)[0]
            case "%":
                return divide(a, b)[1]
            case "min":
                return self.minimum(a, b)
            case _:
                return self.maximum(a, b)

    # memory

    def at(self, pointer: str, offset_bytes: Int) -> str:
        if offset_bytes == 0:
            return pointer
        return self.op(f"getelementptr i8, ptr {pointer}, i64 {offset_bytes}")

    def fetch(self, pointer: str, level: int = 1) -> None:
        """Asks for a cache line, wherever it is; harmless where there is no memory."""
        self.declare("llvm.prefetch.p0", "void @llvm.prefetch.p0(ptr, i32, i32, i32)")
        self.put(f"call void @llvm.prefetch.p0(ptr {pointer}, i32 0, i32 {4 - level}, i32 1)")

    def pin(self, kind: str, values: list[str], register: str) -> list[str]:
        """The same values, computed before any load that follows in the text. `register` is the constraint of inline
        assembly that they are kept under: `v` for all vector registers of AVX-512, else `x`.

        No instruction comes of it. It keeps LLVM's scheduler from moving the loads of one row of a tile up among the
        multiply-adds of another, which leaves too few registers: accumulators are then spilled in every step.
        """
        kinds, n = ", ".join([kind] * len(values)), len(values)
        constraints = ",".join([f"={register}"] * n + [str(i) for i in range(n)] + ["~{memory}"])
        inputs = ", ".join(f"{kind} {v}" for v in values)
        if n == 1:
            return [self.op(f'call {kind} asm sideeffect "", "{constraints}"({inputs})')]
        pinned = self.op(f'call {{{kinds}}} asm sideeffect "", "{constraints}"({inputs})')
        return [self.op(f"extractvalue {{{kinds}}} {pinned}, {i}") for i in range(n)]

    # control

    @contextmanager
    def loop(self, begin: Int, end: Int, step: Int = 1) -> Iterator[str]:
        """`for i in range(begin, end, step)`; skips the body when empty."""
        i, after = self.fresh(), self.fresh()
        head, body, done = self.label(), self.label(), self.label()
        before = self.block
        self.jump(head)
        self.start(head)
        at = len(self.lines)
        self.branch(self.less(i, end), body, done)
        self.start(body)
        yield i
        self.put(f"{after} = add nsw i64 {i}, {step}")
        self.lines.insert(at, f"  {i} = phi i64 [ {begin}, %{before} ], [ {after}, %{self.block} ]")
        self.jump(head)
        self.start(done)

    @contextmanager
    def times(self, n: Int) -> Iterator[Int]:
        """`for i in range(n)`, without a loop where `n` is 1."""
        if n == 1:
            yield 0
            return
        with self.loop(0, n) as i:
            yield i

    def reduce_loop(
        self, times: Int, carried: list[tuple[str, str]], body: Callable[[str, list[str]], list[str]]
    ) -> list[str]:
        """`for i in range(times): carried = body(i, carried)`, at least once; `carried` are (type, initial value)."""
        i, after = self.fresh(), self.fresh()
        head, done = self.label(), self.label()
        before = self.block
        names = [self.fresh() for _ in carried]
        self.jump(head)
        self.start(head)
        at = len(self.lines)
        results = body(i, names)
        self.put(f"{after} = add nuw nsw i64 {i}, 1")
        phis = [f"  {i} = phi i64 [ 0, %{before} ], [ {after}, %{self.block} ]"]
        for name, (kind, start), result in zip(names, carried, results):
            phis.append(f"  {name} = phi {kind} [ {start}, %{before} ], [ {result}, %{self.block} ]")
        self.lines[at:at] = phis
        self.branch(self.less(after, times), head, done)
        self.start(done)
        return results
