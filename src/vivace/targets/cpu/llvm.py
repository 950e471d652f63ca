"""Loop kernels to LLVM text: statements, loops of the four kinds, vectors and their tails.

* parallel loops at the top are flattened; the function computes the units `[begin, end)`;
* a vector loop computes several iterations at once: a main loop over full vectors, then what is left, as one masked
  vector where the instruction set has masks and else in narrower vectors down to single elements;
* vector loops inside vector loops are serial; loops of kind `unroll` are written out;
* a serial loop around a vector loop that reads along the serial axis is done in transposed squares (`tiles`);
* scattered stores of cheap values are scalar; an unrolled loop whose stores fill a gapless run is interleaved;
* buffers of Alloc lie in the thread's scratch memory.

`meta["alias"]` of a kernel lists groups of parameter names that may share memory (in-place operations); all other
parameters are taken to be distinct. A kernel whose only statement is a vector loop is split into units of `_CHUNK`
iterations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vivace.base.dims import Dim, bounds, ceildiv, minimum, prod
from vivace.base.dtypes import DType
from vivace.base.errors import InternalError
from vivace.base.machine import Isa
from vivace.loops.analysis import varies, widest_bits
from vivace.loops.kernel import (
    Alloc,
    Buffer,
    Cast,
    Expr,
    Fetch,
    For,
    Guard,
    Kernel,
    Let,
    Load,
    Reduce,
    Stmt,
    Store,
    dims_of,
    dtype_of,
    walk,
)
from vivace.targets.cpu.arithmetic import cast
from vivace.targets.cpu.builder import Builder, Value, literal
from vivace.targets.cpu.code import KernelCode
from vivace.targets.cpu.env import Env, scalar
from vivace.targets.cpu.expr import emit, emit_stored
from vivace.targets.cpu.interleaved import store_interleaved
from vivace.targets.cpu.isa import has_masks
from vivace.targets.cpu.lanes import tail_mask
from vivace.targets.cpu.loop_costs import is_small, n_together, scatters_cheaply, work
from vivace.targets.cpu.memory import fetch, memory_type, store
from vivace.targets.cpu.reduce import reduce_stored, reduce_together
from vivace.targets.cpu.tiles import Tiles, transposed_loads

_CHUNK = 4096  # iterations of a lone vector loop that make a unit: about a microsecond of streaming
_UNIT_WORK = 16384  # operations that are worth handing to a thread: a few microseconds
_ALIGN = 64


def emit_kernel(kernel: Kernel, isa: Isa) -> KernelCode:
    """The code of a kernel.

    Raises: UnsupportedError for element types or functions without code; InternalError for a kernel that breaks a rule.
    """
    return _Generator(kernel, isa).code()


class _Generator:
    def __init__(self, kernel: Kernel, isa: Isa) -> None:
        self.kernel, self.isa = kernel, isa
        self.b = Builder(kernel.name, isa)
        self.scratch_bytes = 0
        self.dims = dims_of(kernel)

    def code(self) -> KernelCode:
        b, kernel = self.b, self.kernel
        env = Env(b, invariant=self._invariant())
        for k, buffer in enumerate(kernel.params):
            env.buffers[buffer] = self._argument(k, "ptr")
        for k, name in enumerate(self.dims):
            env.symbols[name] = self._argument(len(kernel.params) + k, "i64")
        begin, end = Value("%begin", "i64"), Value("%end", "i64")
        axes, body = _parallel_axes(kernel.body)
        units: Dim = 1
        grain = 1
        if axes:
            units = prod([n for _, n in axes]) * _anything([n for _, n in axes], kernel)
            grain = max(1, _UNIT_WORK // max(1, work(body)))
            b.loop(begin, end, 1, lambda u, _: self._unit(env, axes, body, u))
        elif len(body) == 1 and isinstance(body[0], For) and body[0].kind == "vector":
            units = ceildiv(body[0].extent, _CHUNK)
            self._chunks(env, body[0], begin, end)
        else:
            b.branch(b.compare("icmp slt", begin, end), lambda: self._block(env, body))
        text = b.finish()
        return KernelCode(kernel.name, text, kernel.params, self.dims, units, grain, self.scratch_bytes, "none")

    def _argument(self, k: int, t: str) -> Value:
        args = Value("%args", "ptr")
        word = self.b.inst(f"getelementptr i64, {args}, i64 {k}", "ptr", 0) if k else args
        return self.b.inst(f"load {t}, {word}, !invariant.load !0", t, 0)

    def _invariant(self) -> frozenset[Buffer]:
        """Parameters that nothing writes, under any of their names."""
        written = {s.buffer.name for s in walk(self.kernel) if isinstance(s, Store)}
        written |= {p.name for p in self.kernel.params if p.writable}
        for group in self.kernel.meta.get("alias", ()):  # type: ignore[attr-defined]
            if written & set(group):
                written |= set(group)
        return frozenset(p for p in self.kernel.params if p.name not in written)

    # --- the parallel space ---------------------------------------------------------------------------------------

    def _unit(self, env: Env, axes: list[tuple[str, Dim]], body: tuple[Stmt, ...], u: Value) -> list[Value]:
        symbols: dict[str, Value] = {}
        for var, extent in reversed(axes[1:]):
            n = self.b.call("llvm.smax", scalar(env, extent), literal(1, "i64"))
            if isinstance(extent, int):
                n = literal(max(extent, 1), "i64")
            q = self.b.op("udiv", u, n)
            symbols[var] = self.b.op("sub nsw", u, self.b.imul(q, n))
            u = q
        symbols[axes[0][0]] = u
        self._block(env.at(symbols), body)
        return []

    def _chunks(self, env: Env, loop: For, begin: Value, end: Value) -> None:
        b = self.b
        start = b.imul(begin, literal(_CHUNK, "i64"))
        stop = b.call("llvm.smin", b.imul(end, literal(_CHUNK, "i64")), scalar(env, loop.extent))
        self._vector_range(env, loop, start, stop)

    # --- statements -----------------------------------------------------------------------------------------------

    def _block(self, env: Env, stmts: tuple[Stmt, ...]) -> list[Value]:
        """Statements in a context of their own: lets and buffers end with the block."""
        env = env.at()
        runs = _runs(stmts)
        for run, following in zip(runs, [*runs[1:], []], strict=True):
            if self._stored_reduce(env, run, following):
                following.clear()
                continue
            reduces = [s.expr for s in run if isinstance(s, Let) and isinstance(s.expr, Reduce)]
            values = reduce_together(env, reduces, emit) if len(run) > 1 else None
            if values is None:
                for s in run:
                    self._statement(env, s)
                continue
            for s, value in zip(run, values, strict=True):
                assert isinstance(s, Let)
                self._name(env, s, value)
        return []

    def _stored_reduce(self, env: Env, run: list[Stmt], following: list[Stmt]) -> bool:
        """A loop that stores a row and a let that reduces what was stored, in one pass over the row."""
        if len(run) != 1 or len(following) != 1 or env.plain:
            return False
        loop, let = run[0], following[0]
        if not isinstance(loop, For) or not isinstance(let, Let) or len(loop.body) != 1:
            return False
        if loop.kind != ("vector" if env.lane is None else "serial"):  # along the row, or across several
            return False
        s = loop.body[0]
        if not isinstance(s, Store):
            return False
        stored: Expr | None = None
        if s.buffer.dtype in (DType.f32, DType.f64):
            stored = Load(s.buffer, s.index)
        elif s.buffer.dtype is DType.bf16 and isinstance(s.value, Cast) and dtype_of(s.value.x) is DType.f32:
            stored = s.value.x
        for e in walk(let.expr):
            if isinstance(e, Reduce) and (e.var, e.extent, e.x) == (loop.var, loop.extent, stored):
                value = reduce_stored(env, s, e, emit)
                self._name(env, let, emit(replace(env, given={**env.given, e: value}), let.expr))
                return True
        return False

    def _statement(self, env: Env, s: Stmt) -> None:
        match s:
            case Let(expr=e):
                self._name(env, s, emit(env, e))
            case Store(buffer=buffer, index=index, value=e):
                store(env, buffer, index, emit_stored(env, e, buffer.dtype))
            case Guard(cond=c, body=body):
                cond = emit(env, c)
                if cond.lanes:
                    inner = env.masked(cond)
                    assert inner.mask is not None
                    cond = self.b.call("llvm.vector.reduce.or", inner.mask, t="i1")
                else:
                    inner = env
                self.b.branch(cond, lambda: self._block(inner, body))
            case Fetch(buffer=buffer, index=index, level=level):
                fetch(env, buffer, index, level)
            case Alloc(buffer=buffer):
                env.buffers[buffer] = self._allocate(buffer)
            case For():
                self._loop(env, s)

    def _name(self, env: Env, s: Let, value: Value) -> None:
        t = dtype_of(s.expr)
        env.names[s.name] = value
        if t.is_int:
            env.symbols[s.name] = cast(self.b, value, t, DType.i64)

    def _allocate(self, buffer: Buffer) -> Value:
        extent = 1
        for size, stride in zip(buffer.shape, buffer.strides, strict=True):
            if not isinstance(size, int) or not isinstance(stride, int):
                raise InternalError(f"local buffer {buffer} has no static size", where=self.kernel.name)
            extent += (size - 1) * stride
        memory_type(buffer.dtype)
        offset = self.scratch_bytes
        self.scratch_bytes += -(-extent * buffer.dtype.size_bytes // _ALIGN) * _ALIGN
        scratch = Value("%scratch", "ptr")
        return self.b.inst(f"getelementptr i8, {scratch}, i64 {offset}", "ptr", 0) if offset else scratch

    def _loop(self, env: Env, loop: For) -> None:
        n = scalar(env, loop.extent)
        zero = literal(0, "i64")
        if loop.kind == "parallel":
            raise InternalError(f"parallel loop {loop.var} is not at the top", where=self.kernel.name)
        if loop.kind == "vector" and env.lane is None and not env.plain:
            self._vector_range(env, loop, zero, n)
        elif loop.kind == "serial" and (tiled := self._tiled(env, loop)):
            tiled.emit(env)
        elif loop.kind == "unroll" and store_interleaved(env, loop, emit):
            pass
        elif loop.kind == "unroll" and isinstance(loop.extent, int):
            for k in range(loop.extent):
                self._block(env.at({loop.var: literal(k, "i64")}), loop.body)
        else:
            self.b.loop(zero, n, 1, lambda i, _: self._block(env.at({loop.var: i}), loop.body))

    def _tiled(self, env: Env, loop: For) -> Tiles | None:
        """The tiles for a loop around a vector loop whose operands lie the other way round; None where none does."""
        inner = loop.body[0]
        if len(loop.body) != 1 or not isinstance(inner, For) or inner.kind != "vector" or env.lane or env.plain:
            return None
        if not (loads := transposed_loads(loop, inner)):
            return None
        side = self.isa.vector_bits // 32
        squares = [Buffer("square", DType.f32, (side, side), (side, 1), writable=True) for _ in loads]
        stage = {e: self._allocate(x) for e, x in zip(loads, squares, strict=True)}

        def ordinary(at: Env, start: Value, stop: Value) -> None:
            self._vector_range(at, inner, start, stop)

        return Tiles(self.b, loop, inner, loads, stage, lambda at: self._block(at, inner.body), ordinary)

    # --- vector loops ---------------------------------------------------------------------------------------------

    def _vector_range(self, env: Env, loop: For, start: Value, stop: Value) -> None:
        """Iterations [start, stop) of a vector loop."""
        lanes = max(1, self.isa.vector_bits // max(widest_bits(loop.body, {loop.var}), 8))
        static = isinstance(start.const, int) and isinstance(stop.const, int)
        hi = bounds(loop.extent)[1]
        if scatters_cheaply(loop):
            lanes = 1
        while hi is not None and lanes > 1 and lanes // 2 >= hi:
            lanes //= 2
        unroll = n_together(loop, lanes, hi)
        widths = [lanes * unroll] if unroll > 1 else []
        done = start
        if lanes == 1:
            self._one_by_one(env, loop, start, stop)
            return
        if has_masks(self.isa):
            if widths:
                done = self._vectors(env, loop, done, stop, widths[0])
            if static or is_small(loop):
                done = self._vectors(env, loop, done, stop, lanes)
                self._masked(env, loop, done, stop, lanes)
            else:  # a body of its own for full vectors would cost compile time and gain little
                self._masked(env, loop, done, stop, lanes)
            return
        widths.append(lanes)
        if static:
            while lanes > 1:
                lanes //= 2
                widths.append(lanes)
        elif lanes > 1:
            widths.append(1)
        for width in widths:
            done = self._vectors(env, loop, done, stop, width)

    def _vectors(self, env: Env, loop: For, start: Value, stop: Value, width: int) -> Value:
        """Full vectors of `width` lanes; the first iteration that is left."""
        b = self.b
        if width > 1:
            if isinstance(stop.const, int) and isinstance(start.const, int):
                stop = literal(start.const + (stop.const - start.const) // width * width, "i64")
            else:
                gap = b.op("sub nsw", stop, start)
                gap = b.call("llvm.smax", gap, literal(0, "i64"))
                stop = b.iadd(start, b.op("and", gap, literal(-width, "i64")))

        def body(i: Value, _: list[Value]) -> list[Value]:
            if width == 1:
                inner = env.at({loop.var: i}, plain=True)
            else:
                inner = env.at({loop.var: i}, lane=loop.var, lanes=width)
            return self._block(inner, loop.body)

        b.loop(start, stop, width, body)
        return stop

    def _one_by_one(self, env: Env, loop: For, start: Value, stop: Value) -> None:
        """Scalar iterations, four at a time."""
        b = self.b

        def some(i: Value, n: int) -> list[Value]:
            for k in range(n):
                self._block(env.at({loop.var: b.iadd(i, literal(k, "i64"))}, plain=True), loop.body)
            return []

        gap = b.call("llvm.smax", b.op("sub nsw", stop, start), literal(0, "i64"))
        most = b.iadd(start, b.op("and", gap, literal(-4, "i64")))
        if isinstance(start.const, int) and isinstance(stop.const, int):
            most = literal(start.const + max(stop.const - start.const, 0) // 4 * 4, "i64")
        b.loop(start, most, 4, lambda i, _: some(i, 4))
        b.loop(most, stop, 1, lambda i, _: some(i, 1))

    def _masked(self, env: Env, loop: For, start: Value, stop: Value, width: int) -> None:
        """All iterations that are left, in masked vectors."""

        def body(i: Value, _: list[Value]) -> list[Value]:
            inner = env.at({loop.var: i}, lane=loop.var, lanes=width, mask=tail_mask(self.b, i, stop, width))
            return self._block(inner, loop.body)

        self.b.loop(start, stop, width, body)


def _runs(stmts: tuple[Stmt, ...]) -> list[list[Stmt]]:
    """The statements in order, with neighbouring lets together that reduce over one axis and do not read each other."""
    runs: list[list[Stmt]] = []
    names: set[str] = set()
    for s in stmts:
        first = runs[-1][0] if runs else None
        if (
            isinstance(s, Let)
            and isinstance(s.expr, Reduce)
            and isinstance(first, Let)
            and isinstance(first.expr, Reduce)
            and (s.expr.var, s.expr.extent) == (first.expr.var, first.expr.extent)
            and not varies(s.expr, names)
        ):
            runs[-1].append(s)
        else:
            runs.append([s])
            names = set()
        if isinstance(s, Let):
            names.add(s.name)
    return runs


def _anything(extents: Sequence[Dim], kernel: Kernel) -> Dim:
    """0 where nothing is written however often the parallel loops run, as by the softmax of rows without elements."""
    inner = [prod([d for d in p.shape if d not in extents]) for p in kernel.params if p.writable]
    return minimum(1, sum(dict.fromkeys(inner), 0)) if inner else 1


def _parallel_axes(body: tuple[Stmt, ...]) -> tuple[list[tuple[str, Dim]], tuple[Stmt, ...]]:
    """The perfectly nested parallel loops at the top, and what they run."""
    axes = []
    while len(body) == 1 and isinstance(body[0], For) and body[0].kind == "parallel":
        axes.append((body[0].var, body[0].extent))
        body = body[0].body
    return axes, body
