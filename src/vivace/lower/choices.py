"""How kernels are made where there are several ways: what the cost models say, or what measuring said.

A *site* is what a product, depthwise step or attention computes, whatever the way: its shapes, strides, element types
and epilogue, without how constant weights are packed. Equal sites of any models share what was measured. A *choice*
says what is made otherwise than the cost models would. It is obeyed by `lower/tile.py`, `lower/rules` and
`targets/cpu/depthwise.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace

from vivace.loops.contraction import Contraction, Depthwise, Packing, contraction_dims
from vivace.loops.kernel import Buffer

DIRECT = "direct"  # a convolution without Winograd
FLOATS = "f32"  # a product of bytes in f32 (`rules/floats.py`)
BLOCKS = "blocks"  # an attention in blocks of queries and chunks of keys; the spec is that of its scores


@dataclass(frozen=True, slots=True)
class Choice:
    """What differs from the default; None leaves a setting to the cost model.

    `way` is `direct`, the size of Winograd tiles, such as `2x4`, or of a product of bytes `f32`. `lanes` are columns
    per panel of packed B, `rows` the most rows of a tile. The other settings are those of `Tile`; `tiles` and `panels`
    make a unit, and in Winograd `tiles` make a block. Of a depthwise convolution `rows` are the most columns of a tile,
    `tiles` the rows of a unit, `panels` its vectors. Of an attention `rows` are the most queries of a block, `tiles`
    the most keys of a chunk.
    """

    way: str | None = None
    lanes: int | None = None
    rows: int | None = None
    tiles: int | None = None
    panels: int | None = None
    rows_outer: bool | None = None
    stage_a: bool | None = None
    stage_b: bool | None = None
    k_block: int | None = None
    tiles_outside: bool | None = None

    def settings(self) -> dict[str, str | int | bool]:
        """What is set, as JSON holds it."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}

    @staticmethod
    def of(settings: Mapping[str, object]) -> Choice | None:
        """The inverse of `settings`; None for settings that this version does not know."""
        kinds = {"way": str, **dict.fromkeys(("rows_outer", "stage_a", "stage_b", "tiles_outside"), bool)}
        for name, value in settings.items():
            if name not in Choice.__dataclass_fields__ or type(value) is not kinds.get(name, int):
                return None
            if type(value) is int and not 0 <= value <= 1 << 20:
                return None
        return Choice(**settings)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return " ".join(f"{k}={int(v) if isinstance(v, bool) else v}" for k, v in self.settings().items()) or "default"


DEFAULT = Choice()


@dataclass(frozen=True, slots=True)
class Site:
    """A step with several ways to make it. `ways` are its algorithms, the default one first, where it has several.
    `sizes`, where the rule that made the site knows, is what a choice comes to: choices of equal sizes are one kernel.
    """

    key: str
    spec: Contraction | Depthwise
    ways: tuple[str, ...] = ()
    sizes: Callable[[Choice], object] | None = None


@dataclass(frozen=True, slots=True)
class Choices:
    """The choice for each site, by key; those that are missing are made by default.

    `at` names the sizes of symbolic dims that choices hold for: what is best depends on them.
    """

    by_key: Mapping[str, Choice] = field(default_factory=dict)
    at: str = ""

    def key(self, spec: Contraction | Depthwise) -> str:
        """The name of a site."""
        text = repr(_unpacked(spec)) + (self.at if contraction_dims(spec) else "")
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def of(self, spec: Contraction | Depthwise) -> Choice:
        """What to do at a site."""
        return self.by_key.get(self.key(spec), DEFAULT) if self.by_key else DEFAULT


NO_CHOICES = Choices()


def _unpacked(spec: Contraction | Depthwise) -> Contraction | Depthwise:
    """The same for every packing of constant weights, and for every name."""
    if isinstance(spec, Depthwise) or spec.packing.kind != "panels":
        return replace(spec, name="k")
    b = Buffer("b", spec.b.dtype, (0,), (1,))
    batch, taps = (tuple(replace(x, b=0) for x in axes) for axes in (spec.batch, spec.taps))
    return replace(spec, name="k", batch=batch, taps=taps, b=b, packing=Packing("panels"))
