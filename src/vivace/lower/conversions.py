"""The conversions that a plan has: steps that change the order or the format of values, and compute nothing.

What is fused is no step: a change of order that strides say is nothing, and casts and quantizations that other steps do
on the way, as they load or store, are only counted. Of each step that is left the report tells what it converts, what
that costs (`base/conversions.py`) and why somebody else does not do it on the way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from vivace.base.conversions import format_ps, transpose_ps
from vivace.base.dims import Dim, substitute
from vivace.loops.kernel import Kernel
from vivace.lower.group import VIEWS
from vivace.lower.plan import Plan, Step, steps_of
from vivace.lower.schedule import guess
from vivace.lower.views import Storage

FORMATS = frozenset({"cast", "quantize", "dequantize"})
_CONVERTING = FORMATS | VIEWS | {"pixels"}
_LABELS = frozenset({"copy", "pack", "split", "widen"})  # steps that stand for no node, or for the node that wants them


@dataclass(frozen=True, slots=True)
class Conversion:
    """One step. `before` and `after` are the formats, equal where only the order changes; `bytes` are read and written,
    `cost_us` is on one core."""

    value: str
    step: str
    before: str
    after: str
    bytes: int
    cost_us: float
    why: str


def conversions(plan: Plan, sizes: Mapping[str, int] | None = None) -> list[Conversion]:
    """The steps that are left, with what they cost at these sizes of symbolic dims."""
    steps = steps_of(plan.body)
    readers: dict[Storage, list[Step]] = {}
    for s in steps:
        for storage in s.reads:
            readers.setdefault(storage, []).append(s)
    return [_conversion(s, readers, sizes or {}) for s in steps if _is_conversion(s)]


def report(plan: Plan, sizes: Mapping[str, int]) -> dict[str, object]:
    """For an engine's facts: the steps, and how many conversions of formats are no step."""
    left = conversions(plan, sizes)
    apart = {id(n) for s in steps_of(plan.body) if _is_conversion(s) for n in s.nodes}
    fused = [n.op.name for n in plan.graph.walk() if n.op.name in FORMATS and id(n) not in apart]
    counts = dict(Counter(sorted(fused)))
    return {"conversions": [asdict(c) for c in left], "conversions_fused": counts}


def _is_conversion(s: Step) -> bool:
    names = {n.op.name for n in s.nodes}
    return s.label in _LABELS or (bool(names) and names <= _CONVERTING)


def _conversion(s: Step, readers: dict[Storage, list[Step]], sizes: Mapping[str, int]) -> Conversion:
    def known(d: Dim) -> int:
        return guess(substitute(d, sizes))

    out = s.writes[0]
    source = next((x for x in s.reads if x.kind != "constant" and x is not out), out)
    n = known(out.size)
    ps = transpose_ps(n, source.dtype.size_bytes) if _is_turned(s) else format_ps(n)
    return Conversion(
        out.name, s.label, str(source.dtype), str(out.dtype), known(s.bytes), round(ps * 1e-6, 3),
        _why(s, source, out, readers),
    )  # fmt: skip


def _is_turned(s: Step) -> bool:
    """Whether what lies side by side in the result does not in the operand."""
    if not isinstance(s.spec, Kernel):
        return False
    out = next(b for b in s.spec.params if b.writable)
    inner = [i for i, stride in enumerate(out.strides) if stride == 1]
    read = [b for b in s.spec.params if not b.writable and len(b.strides) == len(out.strides)]
    return any(b.strides[i] not in (0, 1) for b in read for i in inner[-1:])


def _why(s: Step, source: Storage, out: Storage, readers: dict[Storage, list[Step]]) -> str:
    by = ", ".join(dict.fromkeys(r.label for r in readers.get(out, [])))
    if s.label == "widen":
        return "its product was measured slower in bytes than in f32"
    if out.kind == "output":
        return "an output of the model keeps its type and order"
    if source.kind == "input":
        return f"an input of the model keeps its type and order; read by {by}"
    if s.label in ("pack", "split"):
        return f"in the order of the instructions of {by}, as it is not constant"
    others = [r for r in readers.get(source, []) if r is not s]
    shared = f", while {', '.join(dict.fromkeys(r.label for r in others))} reads it as it was" if others else ""
    return f"{by or 'a reader'} converts nothing as it loads{shared}"
