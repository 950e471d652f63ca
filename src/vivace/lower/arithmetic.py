"""How a contraction multiplies and adds: which elements of A and B one lane sums at once, chosen from the element
types and the instruction set. Data only; the instructions are in `targets`.

    kind      A           B      group  instructions
    f32       f32         f32    1      multiply-add
    dot8      u8, i8+128  i8     4      vpdpbusd (AVX512-VNNI, AVX-VNNI)
    wide8     u8, i8      i8     2      both widened to i16, vpmaddwd: exact on every instruction set
    dot16     bf16        bf16   2      vdpbf16ps (AVX512-BF16)
    split16   bf16        bf16   2      both shifted to f32, multiply-add
    wide16    f16         f16    1      both converted to f32, multiply-add: no instruction adds f16 products in f32
    tile8     u8, i8      i8     4      tdpbusd, tdpbssd (AMX)
    tile16    bf16        bf16   2      tdpbf16ps (AMX)

`group` neighbouring steps of the innermost tap lie side by side in a lane of packed B (`pack_groups`). Integer sums are
exact and wrap at 32 bits. vdpbf16ps and tdpbf16ps take denormals as 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from vivace.base.dims import Dim, prod
from vivace.base.dtypes import DType
from vivace.base.errors import UnsupportedError
from vivace.base.machine import Isa, without_amx
from vivace.loops.contraction import Axis, Contraction, Depthwise, merge_axes

# What turns i8 into u8 of the same order; `Contraction.a_offset` may only be this or 0.
SIGN_OFFSET = 128
_TILE_BYTES = 64  # a row of a tile register
LEAST_TILE_ROWS = 8


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """One row of the table above. `n_spare` are registers that a step needs besides accumulators and operands."""

    kind: str
    group: int
    a_bytes: int
    b_bytes: int
    acc: DType
    n_spare: int = 0

    @property
    def lane_bytes(self) -> int:
        """What one lane takes of a row of packed B."""
        return self.group * self.b_bytes

    @property
    def is_tile(self) -> bool:
        return self.kind in ("tile8", "tile16")


F32 = Arithmetic("f32", 1, 4, 4, DType.f32)
DOT8 = Arithmetic("dot8", 4, 1, 1, DType.i32)
WIDE8 = Arithmetic("wide8", 2, 1, 1, DType.i32, 1)
DOT16 = Arithmetic("dot16", 2, 2, 2, DType.f32)
SPLIT16 = Arithmetic("split16", 2, 2, 2, DType.f32, 1)
WIDE16 = Arithmetic("wide16", 1, 2, 2, DType.f32, 1)
TILE8 = Arithmetic("tile8", 4, 1, 1, DType.i32)
TILE16 = Arithmetic("tile16", 2, 2, 2, DType.f32)


def choose_arithmetic(a: DType, b: DType, isa: Isa, a_offset: int = 0) -> Arithmetic:
    """The fastest way to multiply such operands.

    Raises: UnsupportedError for operands that have no kernel.
    """
    if a is b is DType.f32:
        return F32
    if a is b is DType.bf16:
        return TILE16 if isa.has("amx_bf16") else DOT16 if isa.has("avx512_bf16") else SPLIT16
    if a is b is DType.f16:
        return WIDE16
    if a in (DType.u8, DType.i8) and b is DType.i8:
        if isa.has("amx_int8") and not a_offset:
            return TILE8
        fits = a is DType.u8 or a_offset == SIGN_OFFSET
        return DOT8 if fits and _has_dot8(isa) else WIDE8
    raise UnsupportedError(
        f"products of {a} and {b}", expected="f32, bf16 or f16 twice, u8 or i8 and i8", hint="converting one"
    )


def arithmetic_of(c: Contraction | Depthwise, isa: Isa) -> Arithmetic:
    """The arithmetic of a contraction: that of its element types, but tiles only where they pay and fit. A block of few
    rows of a larger product keeps its tiles where B was packed in their groups and no other arithmetic reads those.
    """
    if isinstance(c, Depthwise):
        return choose_arithmetic(c.a.dtype, c.b.dtype, isa)
    found = choose_arithmetic(c.a.dtype, c.b.dtype, isa, c.a_offset)
    if not found.is_tile or _tiles_fit(merge_axes(c), found):
        return found
    other = choose_arithmetic(c.a.dtype, c.b.dtype, without_amx(isa), c.a_offset)
    is_packed = c.packing.kind == "panels" and c.b.shape[-1] == found.group
    return found if is_packed and other.group != found.group else other


def _tiles_fit(c: Contraction, ar: Arithmetic) -> bool:
    """Rows enough to fill tile registers, and a run of A that chunks divide."""
    rows = [r.extent for r in c.rows]
    if all(isinstance(r, int) for r in rows) and prod(rows) < LEAST_TILE_ROWS:  # type: ignore[operator]
        return False
    return does_run_fill_tiles(c.taps, ar.a_bytes) if c.taps else ar.group == 1


def does_run_fill_tiles(taps: tuple[Axis, ...], a_bytes: int) -> bool:
    """Whether the innermost of joined taps is a run of A that chunks divide."""
    return bool(taps) and taps[-1].a == 1 and chunk_bytes(taps[-1].extent * a_bytes) > 0


def chunk_bytes(run_bytes: Dim) -> int:
    """Bytes of A per row that one tile register holds: a multiple of 4 that divides the run, at least half of a
    cache line; 0 where there is none. A run whose length shows when the model runs must be whole lines.
    """
    if not isinstance(run_bytes, int):
        return _TILE_BYTES if run_bytes % _TILE_BYTES == 0 else 0
    fits = [size for size in range(_TILE_BYTES, 0, -4) if run_bytes and run_bytes % size == 0]
    return fits[0] if fits and (fits[0] >= _TILE_BYTES // 2 or run_bytes < _TILE_BYTES) else 0


def activation_offset(c: Contraction, isa: Isa) -> int:
    """What the kernel of a contraction wants added to A (`Contraction.a_offset`): with 128, i8 becomes u8, which
    vpdpbusd asks for.

    Whoever builds the contraction takes it back: `sum((a + offset) * b) = sum(a * b) + offset * sum(b)`.
    """
    wants = c.a.dtype is DType.i8 and _has_dot8(isa) and not arithmetic_of(c, isa).is_tile
    return SIGN_OFFSET if wants else 0


def depthwise_offset(a: DType, isa: Isa) -> int:
    """The same for depthwise convolutions, which vpdpbusd sums with AVX512-VNNI."""
    return SIGN_OFFSET if a is DType.i8 and isa.vector_bits == 512 and isa.has("avx512_vnni") else 0


def _has_dot8(isa: Isa) -> bool:
    return isa.has("avx512_vnni") or isa.has("avx_vnni")
