"""The code of a `Pack`: a unit is one panel of one block of k.

Where n is contiguous, two rows of k are interleaved; where k is, pairs of neighbouring k are elements of 32 bits, whose
squares are transposed.
"""

from __future__ import annotations

from vivace.base.dims import prod
from vivace.base.dtypes import DType
from vivace.base.errors import UnsupportedError
from vivace.base.machine import Isa
from vivace.loops.pack import PAIR, Pack, pack_dims
from vivace.targets.cpu.code import KernelCode
from vivace.targets.cpu.contraction_stage import transpose
from vivace.targets.cpu.contraction_text import Int, Text
from vivace.targets.cpu.contraction_vector import load, mask_text, store, vector_type
from vivace.targets.cpu.isa import kernel_attributes

_HALF_BYTES, _PAIR_BYTES = 2, 4


def emit_pack(p: Pack, isa: Isa) -> KernelCode:
    """The kernel.

    Raises: UnsupportedError where b is contiguous neither along n nor along a k of known extent.
    """
    if p.n_stride != 1 and (p.k_stride != 1 or not isinstance(p.k, int) or p.block):
        raise UnsupportedError(
            f"packing of {p.b}", where=p.name, expected="columns, or rows of known length, that lie side by side"
        )
    dims = pack_dims(p)
    t = Text()
    env: dict[str, Int] = {d: t.op(f"load i64, ptr {t.at('%args', 8 * (2 + i))}, align 8") for i, d in enumerate(dims)}
    b, out = (t.op(f"load ptr, ptr {t.at('%args', 8 * i)}, align 8") for i in range(2))
    n_panels, n_blocks = t.dim(p.n_panels, env), t.dim(p.n_blocks, env)
    units = prod([x.extent for x in p.batch]) * p.n_blocks * p.n_panels
    with t.loop("%begin", "%end") as unit:
        rest, panel = t.divmod(unit, n_panels)
        matrix, block = t.divmod(rest, n_blocks) if p.block else (rest, 0)
        _Panel(t, isa, p, env).emit(
            _source(t, p, env, b, matrix), t.at(out, _matrix_bytes(t, p, env, matrix)), block, panel
        )
    t.put("ret void")
    head = f"define void @{p.name}(ptr %args, i64 %begin, i64 %end, ptr %scratch) #0 {{"
    lines = [head, "entry:", *t.lines, "}", *t.declares.values()]
    text = "\n".join([*lines, f"attributes #0 = {{ {kernel_attributes(isa)} }}", ""])
    return KernelCode(p.name, text, p.params, dims, units, 1, 0, "light")


def _matrix_bytes(t: Text, p: Pack, env: dict[str, Int], matrix: Int) -> Int:
    return t.mul(matrix, t.mul(t.dim(p.size, env), _HALF_BYTES)) if p.batch else 0


def _source(t: Text, p: Pack, env: dict[str, Int], b: str, matrix: Int) -> str:
    for axis in reversed(p.batch):
        matrix, i = t.divmod(matrix, t.dim(axis.extent, env)) if axis is not p.batch[0] else (0, matrix)
        b = t.at(b, t.mul(i, t.mul(t.dim(axis.b, env), p.b.dtype.size_bytes)))
    return b


class _Panel:
    """Writes the code of one panel."""

    def __init__(self, t: Text, isa: Isa, p: Pack, env: dict[str, Int]) -> None:
        self.t, self.isa, self.p, self.env = t, isa, p, env
        self.w = isa.n_f32_lanes
        self.item = p.b.dtype.size_bytes
        self.k_step = t.mul(t.dim(p.k_stride, env), self.item)
        self.n_step = t.mul(t.dim(p.n_stride, env), self.item)
        self.pairs = p.lanes * _PAIR_BYTES  # bytes of a packed row of pairs

    def emit(self, b: str, out: str, block: Int, panel: Int) -> None:
        t, p = self.t, self.p
        k, rows = t.dim(p.k, self.env), t.dim(p.rows, self.env)
        first: Int = 0
        if p.block:
            first = t.mul(block, p.block)
            k, rows = (t.minimum(t.sub(x, first), p.block) for x in (k, rows))
        n = t.dim(p.n, self.env)
        whole = isinstance(n, int) and n % p.lanes == 0
        columns = None if whole else t.minimum(t.sub(n, t.mul(panel, p.lanes)), p.lanes)
        to = t.at(out, t.mul(first, t.mul(t.dim(p.n_panels, self.env), p.lanes * _HALF_BYTES)))
        to = t.at(to, t.mul(panel, t.mul(rows, p.lanes * _HALF_BYTES)))
        source = t.at(t.at(b, t.mul(first, self.k_step)), t.mul(t.mul(panel, p.lanes), self.n_step))
        if p.n_stride == 1:
            self._interleave(source, to, k, rows, columns)
        else:
            assert isinstance(k, int) and isinstance(rows, int)
            self._transpose(source, to, k, rows, columns)

    def _interleave(self, b: str, to: str, k: Int, rows: Int, columns: Int | None) -> None:
        t = self.t
        n_whole, left = t.divmod(k, PAIR)

        def pair(row: Int, n_rows: Int) -> None:
            source = t.at(b, t.mul(row, t.mul(self.k_step, PAIR)))
            for j in range(0, self.p.lanes, self.w):
                mask = None if columns is None else mask_text(t, self.isa, t.sub(columns, j))
                low, high = (
                    self._bits(t.at(t.at(source, t.mul(self.k_step, r)), j * self.item), mask) if r < n_rows else None  # type: ignore[operator]
                    for r in range(PAIR)
                )
                assert low is not None
                kind = vector_type(self.isa, "i32")
                both = low
                if high is not None:
                    both = t.op(f"or {kind} {low}, {t.op(f'shl {kind} {high}, splat (i32 16)')}")
                self._store(both, to, row, j)

        with t.loop(0, n_whole) as row:
            pair(row, PAIR)
        if left != 0:
            with t.loop(n_whole, t.add(n_whole, left)) as row:
                pair(row, 1)
        self._clear(to, t.add(n_whole, left), t.divmod(rows, PAIR)[0])

    def _transpose(self, b: str, to: str, k: int, rows: int, columns: Int | None) -> None:
        """Squares of pairs."""
        t, w = self.t, self.w

        def square(first: Int, n_elements: int) -> None:
            """`n_elements` of k from pair `first` on, at most a square's."""
            for j in range(0, self.p.lanes, w):
                lines = []
                for i in range(w):
                    column = j + i if columns is None else t.minimum(j + i, t.sub(columns, 1))
                    at = t.at(t.at(b, t.mul(column, self.n_step)), t.mul(first, PAIR * self.item))
                    lines.append(self._neighbours(at, n_elements))
                for i, line in enumerate(transpose(t, self.isa, lines, "i32")[: -(-n_elements // PAIR)]):
                    self._store(line, to, t.add(first, i), j)

        n_squares, left = divmod(k, PAIR * w)
        with t.loop(0, n_squares) as i:
            square(t.mul(i, w), PAIR * w)
        if left:
            square(n_squares * w, left)
        self._clear(to, -(-k // PAIR), rows // PAIR)

    def _store(self, value: str, to: str, row: Int, lane: int) -> None:
        t = self.t
        store(t, self.isa, value, t.at(to, t.add(t.mul(row, self.pairs), lane * _PAIR_BYTES)), None, "i32")

    def _clear(self, to: str, first: Int, end: Int) -> None:
        if first == end:
            return
        with self.t.loop(first, end) as row:
            for j in range(0, self.p.lanes, self.w):
                self._store("zeroinitializer", to, row, j)

    def _bits(self, pointer: str, mask: str | None) -> str:
        """Neighbouring elements as bf16, each in the lower half of a lane."""
        t = self.t
        return t.op(
            f"zext {vector_type(self.isa, 'i16')} {self._halves(pointer, mask)} to {vector_type(self.isa, 'i32')}"
        )

    def _halves(self, pointer: str, mask: str | None) -> str:
        t, isa = self.t, self.isa
        if self.p.b.dtype is DType.bf16:
            return load(t, isa, pointer, mask, "i16")
        return _rounded(t, isa, load(t, isa, pointer, mask))

    def _neighbours(self, pointer: str, n_elements: int) -> str:
        """Pairs of neighbouring elements, each in a lane; elements beyond `n_elements` are 0 and not touched."""
        t, w = self.t, self.w
        parts = []
        for j in (0, w):
            mask = mask_text(t, self.isa, n_elements - j) if n_elements > j else ""
            halves = "zeroinitializer" if mask == "" else self._halves(t.at(pointer, j * self.item), mask)
            parts.append(f"<{w} x i16> {halves}")
        order = ", ".join(f"i32 {i}" for i in range(2 * w))
        both = t.op(f"shufflevector {parts[0]}, {parts[1]}, <{2 * w} x i32> <{order}>")
        return t.op(f"bitcast <{2 * w} x i16> {both} to <{w} x i32>")


def _rounded(t: Text, isa: Isa, vector: str) -> str:
    """f32 as the bits of bf16, to nearest even; the instruction takes denormals as 0 (`memory.to_memory`)."""
    w, kind, wide = isa.n_f32_lanes, vector_type(isa), vector_type(isa, "i32")
    if isa.has("avx512_bf16"):
        half = t.op(f"fptrunc {kind} {vector} to <{w} x bfloat>")
        return t.op(f"bitcast <{w} x bfloat> {half} to <{w} x i16>")
    bits = t.op(f"bitcast {kind} {vector} to {wide}")
    odd = t.op(f"and {wide} {t.op(f'lshr {wide} {bits}, splat (i32 16)')}, splat (i32 1)")
    near = t.op(f"add {wide} {bits}, {t.op(f'add {wide} {odd}, splat (i32 32767)')}")
    quiet = t.op(f"or {wide} {bits}, splat (i32 4194304)")
    is_nan = t.op(f"fcmp uno {kind} {vector}, {vector}")
    chosen = t.op(f"select <{w} x i1> {is_nan}, {wide} {quiet}, {wide} {near}")
    high = t.op(f"lshr {wide} {chosen}, splat (i32 16)")
    return t.op(f"trunc {wide} {high} to <{w} x i16>")
