"""Many rows of f32 against block-wise weights on matrix units: as exact as multiply-add, and faster.

A row is the sum of three bf16 (`loops/split.py`), and q, less a whole zero point, is an integer of 8 bits and a sign,
which bf16 holds. So three tile products per block give the sum of a * q in f32, which waits in memory for its scale:

    totals[row, column] += scale[block, column] * sum of a * q + shift[block, column] * sum of a

where shifts that are floats stand in for zero points; q is then not centred, and the two terms may cancel. Error: each
product is exact, and each addition rounds once, as with multiply-add. Rows with NaN, infinity or numbers whose sums
might overflow go the f32 way (`blockwise_floats.py`).

Scratch: the panel as bf16, 32 columns after the other; sums of 32 rows and 32 columns; totals of 32 rows and a panel.
"""

from __future__ import annotations

from dataclasses import dataclass

from vivace.base.machine import Isa
from vivace.loops.blockwise import BlockwiseProduct
from vivace.loops.split import N_PARTS, TILE_BYTES, TILE_ROWS, TILE_STEPS, n_sums
from vivace.lower.arithmetic import TILE16
from vivace.targets.cpu.blockwise_floats import float_symbol
from vivace.targets.cpu.blockwise_store import store_rows
from vivace.targets.cpu.blockwise_weights import Panel, Weights, dequantize
from vivace.targets.cpu.contraction_plan import Plan, load_dims
from vivace.targets.cpu.contraction_step import multiply_add, splat
from vivace.targets.cpu.contraction_text import Int, Text
from vivace.targets.cpu.contraction_vector import load, mask_text, store

GROUPS = 2  # of 16 rows, at once
_COLUMNS = 32  # at once: four tile registers of sums
_LINE = 64
_SUMS_BYTES = GROUPS * TILE_ROWS * _COLUMNS * 4
_PAIRS_BYTES = TILE_STEPS // 2 * _COLUMNS * 4  # 32 columns of weights for the steps of a tile
_A, _B = 4, 5
_WIDTH = 16


def scratch_bytes(w: BlockwiseProduct) -> int:
    return _panel_bytes(w) * (w.lanes // _COLUMNS) + _SUMS_BYTES + GROUPS * TILE_ROWS * w.lanes * 4


def rows_at_once(w: BlockwiseProduct, cache_bytes: int) -> int:
    """Rows that meet all panels before the next do: their parts take half of the second-level cache."""
    row_bytes = w.n_blocks * w.block * N_PARTS * 2
    whole = GROUPS * TILE_ROWS
    return max(1, cache_bytes // 2 // row_bytes // whole) * whole


def sums_bytes(w: BlockwiseProduct) -> int:
    """Of one group of rows."""
    return n_sums(w.n_blocks * w.block, w.has_sums) * TILE_ROWS * 4


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the first of some rows lies: as f32, in parts, its sums, and its result."""

    a: str
    parts: str
    sums: str
    out: str


def _panel_bytes(w: BlockwiseProduct) -> int:
    """Of 32 columns."""
    return w.n_blocks * w.block * _COLUMNS * 2


def tiles_symbol(w: BlockwiseProduct, groups: int) -> str:
    return f"{w.name}.tiles{groups}"


def row_symbol(w: BlockwiseProduct, tail: bool) -> str:
    return f"{w.name}.row{'.tail' if tail else ''}"


def configure(t: Text, w: BlockwiseProduct) -> None:
    """Gives all tile registers their full size."""
    raw = bytearray(_LINE)
    raw[0] = 1
    for tile in range(8):
        raw[16 + 2 * tile], raw[48 + tile] = _LINE, TILE_ROWS
    text = "".join(f"\\{byte:02x}" for byte in raw)
    name = f"{w.name}.whole_tiles"
    t.declares[name] = f'@{name} = private constant [{_LINE} x i8] c"{text}", align {_LINE}'
    t.declare("llvm.x86.ldtilecfg", "void @llvm.x86.ldtilecfg(ptr)")
    t.put(f"call void @llvm.x86.ldtilecfg(ptr @{name})")


def prepare_panel(t: Text, w: BlockwiseProduct, isa: Isa, panel: Panel) -> None:
    """The integers of a panel as bf16 in scratch."""
    dequantize(t, w, isa, TILE16, _COLUMNS, panel, is_scaled=False)


def multiply_rows(
    t: Text, w: BlockwiseProduct, p: Plan, rows: Rows, panel: Panel, n: Int, row: Int, left: Int, tail: bool
) -> None:
    """At most 32 rows from `row` on times a panel, the one in scratch."""
    totals = t.at("%scratch", _panel_bytes(w) * (w.lanes // _COLUMNS) + _SUMS_BYTES)
    one, two, done = t.label(), t.label(), t.label()
    t.branch(t.less(TILE_ROWS, left), two, one)
    for label, groups in ((one, 1), (two, GROUPS)):
        t.start(label)
        given = f"ptr {rows.parts}, ptr {rows.sums}, ptr {panel.scales}, ptr {panel.shifts}"
        t.put(f"call void @{tiles_symbol(w, groups)}({given}, ptr %scratch, ptr {totals})")
        t.jump(done)
    t.start(done)
    dims = load_dims(t, p)
    out_step, a_step = t.mul(t.dim(w.m.out, dims), p.out_bytes), t.mul(t.dim(w.m.a, dims), 4)
    with t.loop(0, t.minimum(left, GROUPS * TILE_ROWS)) as r:
        group, line = t.divmod(r, TILE_ROWS)
        place = t.add(t.mul(group, sums_bytes(w)), t.mul(line, 4))
        mark = t.op(f"load float, ptr {t.at(rows.sums, t.add(place, sums_bytes(w) - TILE_ROWS * 4))}, align 4")
        end = f"ptr {t.at(rows.out, t.mul(r, out_step))}, i64 {n}, i64 {t.add(row, r)})"
        usual, odd, done = t.label(), t.label(), t.label()
        t.branch(t.op(f"fcmp oeq float {mark}, 0.0"), usual, odd)
        t.start(usual)
        t.put(f"call void @{row_symbol(w, tail)}(ptr %args, ptr {t.at(totals, t.mul(r, w.lanes * 4))}, {end}")
        t.jump(done)
        t.start(odd)
        numbers = f"ptr {panel.b}, ptr {panel.scales}, ptr {panel.shifts}"
        t.put(
            f"call void @{float_symbol(w, 1, tail)}(ptr %args, ptr {t.at(rows.a, t.mul(r, a_step))}, {numbers}, {end}"
        )
        t.jump(done)
        t.start(done)


def row_function(w: BlockwiseProduct, p: Plan, tail: bool) -> tuple[str, dict[str, str]]:
    """The function that finishes one row of totals."""
    t, isa = Text(), p.isa
    vectors = -(-(w.n % w.lanes) // _WIDTH) if tail else w.lanes // _WIDTH
    dims = load_dims(t, p)
    totals = [load(t, isa, t.at("%totals", v * _LINE), None) for v in range(vectors)]
    masks = [mask_text(t, isa, w.n % w.lanes - v * _WIDTH) if tail else None for v in range(vectors)]
    store_rows(t, w, p, dims, [totals], masks)
    head = f"define internal void @{row_symbol(w, tail)}(ptr %args, ptr %totals, ptr %out, i64 %n, i64 %m)"
    return "\n".join([f"{head} noinline #0 {{", "entry:", *t.lines, "}"]), t.declares


def tiles_function(w: BlockwiseProduct, isa: Isa, groups: int) -> tuple[str, dict[str, str]]:
    """The function that sums up to 16 times `groups` rows and a panel in totals."""
    t = Text()
    with t.loop(0, groups * TILE_ROWS * w.lanes // _WIDTH) as i:
        store(t, isa, "zeroinitializer", t.at("%totals", t.mul(i, _LINE)), None)
    sums = t.at("%panel", _panel_bytes(w) * (w.lanes // _COLUMNS))
    with t.loop(0, w.n_blocks) as i:
        numbers = Panel("null", "%scales", "%shifts").block(t, w, i)
        for part in range(w.lanes // _COLUMNS):
            _sum_block(t, w, i, part, groups, sums)
            _scale(t, w, isa, i, numbers, part, groups, sums)
    t.put("ret void")
    head = f"define internal void @{tiles_symbol(w, groups)}("
    head += "ptr %parts, ptr %sums, ptr %scales, ptr %shifts, ptr %panel, ptr %totals)"
    return "\n".join([f"{head} noinline #0 {{", "entry:", *t.lines, "}"]), t.declares


def _sum_block(t: Text, w: BlockwiseProduct, i: str, column_part: int, groups: int, sums: str) -> None:
    """One block of rows and 32 columns, summed in tile registers and stored."""
    for name, parameters in (("tilezero", "i8"), ("tdpbf16ps", "i8, i8, i8"), ("tileloadd64", "i8, ptr, i64"),
                             ("tilestored64", "i8, ptr, i64")):  # fmt: skip
        t.declare(f"llvm.x86.{name}", f"void @llvm.x86.{name}({parameters})")
    for tile in range(2 * groups):
        t.put(f"call void @llvm.x86.tilezero(i8 {tile})")
    per_block = w.block // TILE_STEPS
    group_bytes = w.n_blocks * per_block * N_PARTS * TILE_BYTES
    panel = t.at("%panel", column_part * _panel_bytes(w))
    with t.times(per_block) as c:
        chunk = t.add(t.mul(i, per_block), c)
        a = t.at("%parts", t.mul(chunk, N_PARTS * TILE_BYTES))
        b = t.at(panel, t.mul(chunk, _PAIRS_BYTES))
        # What comes next is asked into the first-level cache between the products: each part of the columns asks for
        # some of A.
        coming = [t.at(b, _PAIRS_BYTES + line) for line in range(0, _PAIRS_BYTES, _LINE)]
        wanted = range(groups) if per_block > 1 and column_part == 0 else ()
        if per_block == 1:
            wanted = range(column_part, groups, w.lanes // _COLUMNS)
        for g in wanted:
            start = t.at(a, N_PARTS * TILE_BYTES + g * group_bytes)
            coming += [t.at(start, line) for line in range(0, N_PARTS * TILE_BYTES, _LINE)]
        products = [
            (part, g, v if g % 2 == 0 else 1 - v) for part in range(N_PARTS) for g in range(groups) for v in (0, 1)
        ]
        held = -1
        for number, (part, g, v) in enumerate(products):
            if number % 2 == 0:
                at = t.at(a, part * TILE_BYTES + g * group_bytes)
                t.put(f"call void @llvm.x86.tileloadd64(i8 {_A}, ptr {at}, i64 {_LINE})")
            if v != held:
                t.put(f"call void @llvm.x86.tileloadd64(i8 {_B}, ptr {t.at(b, v * _LINE)}, i64 {2 * _LINE})")
            held = v
            t.put(f"call void @llvm.x86.tdpbf16ps(i8 {2 * g + v}, i8 {_A}, i8 {_B})")
            for place in coming[number :: len(products)]:
                t.fetch(place)
    for g in range(groups):
        for v in range(2):
            to = t.at(sums, g * TILE_ROWS * _COLUMNS * 4 + v * _LINE)
            t.put(f"call void @llvm.x86.tilestored64(i8 {2 * g + v}, ptr {to}, i64 {2 * _LINE})")


def _scale(
    t: Text, w: BlockwiseProduct, isa: Isa, i: Int, numbers: Panel, column_part: int, groups: int, sums: str
) -> None:
    """Adds the sums of a block times their scales to the totals, and the sums of A times the shifts."""
    weights, first = Weights(w, isa), column_part * _COLUMNS // _WIDTH
    vectors = range(first, first + _COLUMNS // _WIDTH)
    factors = [weights.scale(t, numbers.scales, v) for v in vectors]
    shifts = [weights.shift(t, numbers.shifts, v) for v in vectors] if w.has_sums else []
    per_block = w.block // TILE_STEPS
    of_a = t.at("%sums", t.mul(i, per_block * TILE_ROWS * 4))
    for r in range(groups * TILE_ROWS):
        group, line = divmod(r, TILE_ROWS)
        places = [t.at("%totals", r * w.lanes * 4 + v * _LINE) for v in vectors]
        totals = [load(t, isa, place, None) for place in places]
        for c in range(per_block if w.has_sums else 0):
            there = t.at(of_a, group * sums_bytes(w) + (c * TILE_ROWS + line) * 4)
            a = splat(t, isa, t.op(f"load float, ptr {there}, align 4"), "float")
            totals = [multiply_add(t, isa, a, shift, total) for shift, total in zip(shifts, totals)]
        for v, place in enumerate(places):
            found = load(t, isa, t.at(sums, r * _COLUMNS * 4 + v * _LINE), None)
            store(t, isa, multiply_add(t, isa, found, factors[v], totals[v]), place, None)
