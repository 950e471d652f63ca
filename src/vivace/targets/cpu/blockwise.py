"""Kernels of products with block-wise weights of 4 or 8 bits.

Few rows of A: weights become f32 in registers, at the speed of memory; a block is summed without its scale, which then
multiplies the sum. Many rows: each panel is turned into f32 in scratch once, and the f32 micro-kernels of contractions
multiply it. A unit is one panel. Where the number of rows is known at run time only, the kernel holds both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vivace.base.dims import Dim, bounds
from vivace.base.dtypes import DType
from vivace.base.errors import UnsupportedError
from vivace.base.machine import Isa
from vivace.loops.blockwise import BlockwiseProduct
from vivace.lower.arithmetic import F32
from vivace.lower.tile import Tile, max_rows, split_axis
from vivace.targets.cpu.builder import Value
from vivace.targets.cpu.code import KernelCode
from vivace.targets.cpu.contraction import micro_kernel
from vivace.targets.cpu.contraction_epilogue import Epilogue
from vivace.targets.cpu.contraction_plan import Plan, base_of, load_dims, symbol_of, variants
from vivace.targets.cpu.contraction_step import multiply_add, splat
from vivace.targets.cpu.contraction_text import Int, Text
from vivace.targets.cpu.contraction_vector import F32_BYTES, load, mask_text, store, vector_type
from vivace.targets.cpu.isa import kernel_attributes

_MOST_DIRECT_ROWS = 4  # beyond, making f32 panels once is cheaper than unpacking the weights for every two rows
_DIRECT_SIZES = (2, 1)
_GROUP = 8  # steps of k that one round unpacks: those in a word of 4-bit weights


def emit_blockwise(w: BlockwiseProduct, isa: Isa) -> KernelCode:
    """The kernel of a product with block-wise weights.

    Raises: UnsupportedError for f16 scales where the CPU cannot convert them.
    """
    if w.scales.dtype is not DType.f32 and not (w.scales.dtype is DType.f16 and "+f16c" in isa.features):
        raise UnsupportedError(f"scales of {w.scales.dtype}", where=w.name, expected="f32")
    nv = w.lanes // isa.n_f32_lanes
    inner = split_axis(w.m.extent, max_rows(nv, isa))
    tile = Tile(nv, w.lanes, ((1, 1),), inner, 4, 1, 1, False, False)
    p = Plan(w.name, w.product, isa, F32, tile, w.params, w.dims)
    most, least = bounds(w.m.extent)[1], bounds(w.m.extent)[0] or 0
    is_direct = least <= _MOST_DIRECT_ROWS
    is_staged = most is None or most > _MOST_DIRECT_ROWS
    tails = [tail for tail, there in ((False, p.has_full_panel), (True, p.tail_vectors > 0)) if there]
    texts = [_driver(w, p, is_direct, is_staged, tails)]
    if is_direct:
        texts += [_direct(w, p, size, tail) for size in _DIRECT_SIZES for tail in tails]
    if is_staged:
        texts += [micro_kernel(p, *v) for v in variants(p)]
    declares: dict[str, str] = {}
    for _, declared in texts:
        declares |= declared
    attributes = f"attributes #0 = {{ {kernel_attributes(isa)} }}"
    text = "\n".join([*(x for x, _ in texts), *declares.values(), "!0 = !{}", attributes, ""])
    scratch = w.n_blocks * w.block * w.lanes * F32_BYTES if is_staged else 0
    return KernelCode(w.name, text, w.params, w.dims, w.n_panels, 1, scratch, "light")


@dataclass(frozen=True, slots=True)
class _Weights:
    """Unpacks weights of one panel; `values` are q less 8 (or 128) as f32."""

    w: BlockwiseProduct
    isa: Isa

    def group(self, t: Text, pointer: str, vector: int) -> Callable[[int], str]:
        """A group of 8 steps of one vector of columns: what gives the f32 of one step."""
        isa, lanes = self.isa, self.isa.n_f32_lanes
        wide, kind = vector_type(isa, "i32"), vector_type(isa)
        if self.w.bits == 8:

            def byte(step: int) -> str:
                narrow = load(t, isa, t.at(pointer, step * self.w.lanes + vector * lanes), None, "i8")
                extended = t.op(f"sext {vector_type(isa, 'i8')} {narrow} to {wide}")
                return t.op(f"sitofp {wide} {extended} to {kind}")

            return byte
        words = load(t, isa, t.at(pointer, vector * lanes * 4), None, "i32")

        if lanes == 16:
            name = "llvm.x86.avx512.permvar.sf.512"
            t.declare(name, f"{kind} @{name}({kind}, {wide})")
            table = ", ".join(f"float {float(v)}" for v in range(-8, 8))

            def looked_up(step: int) -> str:
                """A look-up takes the low four bits of each lane."""
                moved = words if step == 0 else t.op(f"lshr {wide} {words}, splat (i32 {4 * step})")
                return t.op(f"call {kind} @{name}({kind} <{table}>, {wide} {moved})")

            return looked_up
        upper = t.op(f"lshr {wide} {words}, splat (i32 16)")

        def nibble(step: int) -> str:
            """Or-ed into the mantissa of a power of two whose last place is 1, the four bits add their value to it."""
            at = 4 * (step % 4)
            power = 23 - at
            kept = t.op(f"and {wide} {upper if step >= 4 else words}, splat (i32 {15 << at})")
            bits = t.op(f"or {wide} {kept}, splat (i32 {(127 + power) << 23})")
            return t.op(f"fsub {kind} {t.op(f'bitcast {wide} {bits} to {kind}')}, splat (float {float(2**power + 8)})")

        return nibble

    def scale(self, t: Text, pointer: str, vector: int) -> str:
        isa, at = self.isa, vector * self.isa.n_f32_lanes
        if self.w.scales.dtype is DType.f32:
            return load(t, isa, t.at(pointer, at * F32_BYTES), None)
        half = t.op(f"load {vector_type(isa, 'half')}, ptr {t.at(pointer, at * 2)}, align 2")
        return t.op(f"fpext {vector_type(isa, 'half')} {half} to {vector_type(isa)}")

    def shift(self, t: Text, pointer: str, vector: int) -> str:
        isa = self.isa
        narrow = load(t, isa, t.at(pointer, vector * isa.n_f32_lanes * 2), None, "i16")
        wide = t.op(f"sext {vector_type(isa, 'i16')} {narrow} to {vector_type(isa, 'i32')}")
        return t.op(f"sitofp {vector_type(isa, 'i32')} {wide} to {vector_type(isa)}")

    @property
    def group_bytes(self) -> int:
        return _GROUP * self.w.lanes * self.w.bits // 8


@dataclass(frozen=True, slots=True)
class _Panel:
    """Addresses of a panel's weights, scales and shifts, moved on by blocks."""

    b: str
    scales: str
    shifts: str

    def block(self, t: Text, w: BlockwiseProduct, i: Int) -> _Panel:
        scales = t.at(self.scales, t.mul(i, w.lanes * w.scales.dtype.size_bytes))
        shifts = t.at(self.shifts, t.mul(i, w.lanes * 2)) if w.shifts is not None else ""
        return _Panel(t.at(self.b, t.mul(i, w.block_bytes)), scales, shifts)


def _direct(w: BlockwiseProduct, p: Plan, rows: int, tail: bool) -> tuple[str, dict[str, str]]:
    """The function for `rows` rows of A and one panel."""
    t, isa, kind = Text(), p.isa, vector_type(p.isa)
    width, weights = isa.n_f32_lanes, _Weights(w, isa)
    vectors = p.tail_vectors if tail else p.tile.nv
    dims = load_dims(t, p)
    a_rows = [t.mul(t.mul(t.dim(w.m.a, dims), F32_BYTES), r) for r in range(rows)]
    panel = _Panel("%b", "%scales", "%shifts")
    zero = "zeroinitializer"
    n_sums = rows if w.shifts is not None else 0

    def group(a: str, b: str, n_steps: int, carried: list[str]) -> list[str]:
        """Adds up to 8 steps to the accumulators of a block and, for shifts, to the sums of A."""
        acc, sums = carried[: rows * vectors], carried[rows * vectors :]
        steps = [weights.group(t, b, v) for v in range(vectors)]
        for s in range(n_steps):
            values = [
                splat(t, isa, t.op(f"load float, ptr {t.at(t.at(a, x), s * 4)}, align 4"), "float") for x in a_rows
            ]
            for v in range(vectors):
                weight = steps[v](s)
                for r in range(rows):
                    acc[r * vectors + v] = multiply_add(t, isa, values[r], weight, acc[r * vectors + v])
            sums = [t.op(f"fadd {kind} {x}, {y}") for x, y in zip(sums, values)]
        return [*acc, *sums]

    def block(a: str, at: _Panel, n_steps: int, totals: list[str]) -> list[str]:
        n_groups, left = divmod(n_steps, _GROUP)
        carried = [zero] * (rows * vectors + n_sums)
        if n_groups:
            carried = t.reduce_loop(
                n_groups,
                [(kind, x) for x in carried],
                lambda g, c: group(t.at(a, t.mul(g, 4 * _GROUP)), t.at(at.b, t.mul(g, weights.group_bytes)), _GROUP, c),
            )
        if left:
            carried = group(t.at(a, 4 * _GROUP * n_groups), t.at(at.b, weights.group_bytes * n_groups), left, carried)
        acc, sums = carried[: rows * vectors], carried[rows * vectors :]
        for v in range(vectors):
            scale = weights.scale(t, at.scales, v)
            shift = weights.shift(t, at.shifts, v) if sums else ""
            for r in range(rows):
                i = r * vectors + v
                sum_ = multiply_add(t, isa, sums[r], shift, acc[i]) if sums else acc[i]
                totals[i] = multiply_add(t, isa, sum_, scale, totals[i])
        return totals

    whole, left_over = divmod(w.k, w.block)
    totals = [zero] * (rows * vectors)
    if whole:
        totals = t.reduce_loop(
            whole,
            [(kind, x) for x in totals],
            lambda i, c: block(t.at("%a", t.mul(i, w.block * 4)), panel.block(t, w, i), w.block, list(c)),
        )
    if left_over:
        totals = block(t.at("%a", whole * w.block * 4), panel.block(t, w, whole), left_over, list(totals))
    masks = [mask_text(t, isa, w.n % w.lanes - v * width) if tail else None for v in range(vectors)]
    symbols: dict[str, Int] = {**dims, "n": "%n", w.m.name: "%m"}
    epilogue = Epilogue(t, isa, "n", symbols, {x: base_of(t, p, x) for x in dict.fromkeys(w.extra)})
    out_row = t.mul(t.dim(w.m.out, dims), p.out_bytes)
    places = [t.mul(out_row, r) for r in range(rows)]
    for r in range(rows):
        for v in range(vectors):
            total = Value(totals[r * vectors + v], "float", width)
            moved = {w.m.name: r, "n": v * width}
            offset = t.add(places[r], v * width * p.out_bytes)
            epilogue.store(w.epilogue, total, moved, w.out, "%out", offset, masks[v])
    epilogue.close()
    t.put("ret void")
    parameters = "ptr %args, ptr %a, ptr %b, ptr %scales, ptr %shifts, ptr %out, i64 %n, i64 %m"
    head = f"define internal void @{_direct_symbol(w, rows, tail)}({parameters}) noinline #0 {{"
    return "\n".join([head, "entry:", *t.lines, "}"]), t.declares


def _direct_symbol(w: BlockwiseProduct, rows: int, tail: bool) -> str:
    return f"{w.name}.rows{rows}{'.tail' if tail else ''}"


def _driver(
    w: BlockwiseProduct, p: Plan, is_direct: bool, is_staged: bool, tails: list[bool]
) -> tuple[str, dict[str, str]]:
    """The exported function: panel by panel, with few rows or with many."""
    t = Text()
    dims = load_dims(t, p)
    a, b, scales, out = (base_of(t, p, x) for x in (w.a, w.b, w.scales, w.out))
    shifts = "null" if w.shifts is None else base_of(t, p, w.shifts)
    n_rows = t.dim(w.m.extent, dims)
    with t.loop("%begin", "%end") as number:
        whole = _Panel(b, scales, shifts)
        panel = whole.block(t, w, t.mul(number, w.n_blocks))
        if w.shifts is None:
            panel = _Panel(panel.b, panel.scales, "null")
        n = t.mul(number, w.lanes)
        corner = t.at(out, t.mul(n, p.out_bytes))
        few, many, done = t.label(), t.label(), t.label()
        if is_direct and is_staged:
            t.branch(t.less(_MOST_DIRECT_ROWS, n_rows), many, few)
        else:
            t.jump(few if is_direct else many)
        if is_direct:
            t.start(few)
            _by_panel(t, w, p, n, tails, lambda tail: _few_rows(t, w, p, dims, n_rows, (a, panel, corner), n, tail))
            t.jump(done)
        if is_staged:
            t.start(many)
            _dequantize(t, w, p, panel)
            _by_panel(t, w, p, n, tails, lambda tail: _many_rows(t, w, p, dims, (a, corner), n, tail))
            t.jump(done)
        t.start(done)
    t.put("ret void")
    head = f"define void @{w.name}(ptr %args, i64 %begin, i64 %end, ptr %scratch) #0 {{"
    return "\n".join([head, "entry:", *t.lines, "}"]), t.declares


def _by_panel(t: Text, w: BlockwiseProduct, p: Plan, n: Int, tails: list[bool], then: Callable[[bool], None]) -> None:
    """Code for whole panels and for the last, where both occur."""
    if len(tails) == 1:
        then(tails[0])
        return
    full, tail, done = t.label(), t.label(), t.label()
    t.branch(t.op(f"icmp sle i64 {t.add(n, w.lanes)}, {w.n}"), full, tail)
    for label, is_tail in ((full, False), (tail, True)):
        t.start(label)
        then(is_tail)
        t.jump(done)
    t.start(done)


def _row(t: Text, dims: Mapping[str, Int], base: str, step: Dim, size: int, row: Int) -> str:
    return t.at(base, t.mul(row, t.mul(t.dim(step, dims), size)))


def _few_rows(
    t: Text, w: BlockwiseProduct, p: Plan, dims: Mapping[str, Int], n_rows: Int, at: tuple[str, _Panel, str], n: Int,
    tail: bool,
) -> None:  # fmt: skip
    a, panel, out = at

    def call(size: int, row: Int) -> None:
        a_row, out_row = _row(t, dims, a, w.m.a, F32_BYTES, row), _row(t, dims, out, w.m.out, p.out_bytes, row)
        rest = f"ptr {panel.b}, ptr {panel.scales}, ptr {panel.shifts}, ptr {out_row}, i64 {n}, i64 {row}"
        t.put(f"call void @{_direct_symbol(w, size, tail)}(ptr %args, ptr {a_row}, {rest})")

    most = _DIRECT_SIZES[0]
    pairs, left = t.divmod(n_rows, most)
    even = t.mul(pairs, most)
    with t.loop(0, even, most) as row:
        call(most, row)
    with t.loop(0, left) as row:
        call(1, t.add(even, row))


def _many_rows(
    t: Text, w: BlockwiseProduct, p: Plan, dims: Mapping[str, Int], at: tuple[str, str], n: Int, tail: bool
) -> None:
    a, out = at
    start: Int = 0
    for count, size in p.tile.inner:
        if bounds(count)[1] == 0:
            continue
        pieces = t.dim(count, dims)
        with t.loop(0, pieces) as piece:
            row = t.add(start, t.mul(piece, size))
            a_row, out_row = _row(t, dims, a, w.m.a, F32_BYTES, row), _row(t, dims, out, w.m.out, p.out_bytes, row)
            arguments = f"ptr %args, ptr {a_row}, ptr %scratch, ptr {out_row}, i64 {n}, i64 {row}"
            t.put(f"call void @{symbol_of(p, 1, size, tail)}({arguments})")
        start = t.add(start, t.mul(pieces, size))


def _dequantize(t: Text, w: BlockwiseProduct, p: Plan, panel: _Panel) -> None:
    """Makes the panel in scratch, as f32."""
    isa, weights, kind = p.isa, _Weights(w, p.isa), vector_type(p.isa)
    with t.loop(0, w.n_blocks) as i:
        at = panel.block(t, w, i)
        to = t.at("%scratch", t.mul(i, w.block * w.lanes * F32_BYTES))
        scales = [weights.scale(t, at.scales, v) for v in range(p.tile.nv)]
        shifts = [weights.shift(t, at.shifts, v) if w.shifts is not None else "" for v in range(p.tile.nv)]
        with t.loop(0, w.block // _GROUP) as g:
            b, rows = t.at(at.b, t.mul(g, weights.group_bytes)), t.at(to, t.mul(g, _GROUP * w.lanes * F32_BYTES))
            for v in range(p.tile.nv):
                step = weights.group(t, b, v)
                for s in range(_GROUP):
                    value = step(s)
                    if shifts[v]:
                        value = t.op(f"fadd {kind} {value}, {shifts[v]}")
                    value = t.op(f"fmul {kind} {value}, {scales[v]}")
                    store(t, isa, value, t.at(rows, s * w.lanes * F32_BYTES + v * isa.vector_bits // 8), None)
