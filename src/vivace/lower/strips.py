"""A depthwise convolution with its neighbours, strip by strip of rows: what they hand to each other stays in the cache.

    before   p = pads of e(x)      q = depthwise(p)      y = j(q)              p and q in memory, whole
    after    for each strip of rows of y:   its rows of p, its rows of q, in scratch of the thread;   its rows of y

e is a convolution, often one that widens (1x1), j one of a single tap, which narrows again; either may be missing.

Rules:
* ALONE: nothing else reads or writes p or q, and nothing in between writes what the three of them read.
* HALO: rows of p that two strips read are computed in each of them. Strips are as high as a quarter of the second-level
  cache allows, and low enough to make work for some threads.
* PAYS: only where p and q together would not stay in the second-level cache, and the time to move them exceeds that of
  the rows computed twice.

Not handled: rows and columns whose number only shows when the model runs; other ranks than images. A site that is
joined is made as its tiles are chosen by default: it is no site of tuning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from vivace.base.dims import Dim, maximum, minimum, prod, symbol
from vivace.base.machine import Machine, host
from vivace.loops.blocked import BLOCK, PART, Blocked, Stage
from vivace.loops.contraction import Contraction, Depthwise, contraction_params, substitute_expr
from vivace.loops.kernel import Buffer, For, Kernel, Store
from vivace.lower.chains import Chain, Padded, chain_at, contraction_of, known
from vivace.lower.joining import Joined, join_steps
from vivace.lower.plan import Instruction, Operand, Plan, Step
from vivace.lower.views import Storage

_LEAST_STRIPS = 4
_BYTES_PER_NS, _FLOPS_PER_NS = 15.0, {4: 100.0, 2: 400.0, 1: 800.0}  # from beyond the cache; by bytes of an element


def in_strips(plan: Plan, machine: Machine | None = None) -> Plan:
    """The plan with the steps around its depthwise convolutions joined, where it pays."""
    here = machine or host()

    def join(body: Sequence[Instruction | None], touched: Mapping[Storage, Sequence[int]], at: int) -> Joined | None:
        step = body[at]
        chain = chain_at(body, touched, at) if isinstance(step, Step) and isinstance(step.spec, Depthwise) else None
        rows = 0 if chain is None else _rows_per_strip(chain, here)
        return Joined(_joined(chain, rows), chain.steps, chain.inner) if chain is not None and rows else None

    return join_steps(plan, join)


def _rows_per_strip(chain: Chain, machine: Machine) -> int:
    """Rows of the result in a strip; 0 where it does not pay."""
    height, l2 = chain.d.rows[1].extent, machine.cache_bytes(2)
    assert isinstance(height, int)
    moved = chain.inner_bytes
    if moved <= l2:
        return 0
    rows = max((r for r in range(1, -(-height // _LEAST_STRIPS) + 1) if _strip_bytes(chain, r) <= l2 // 4), default=0)
    if rows == 0:
        return 0
    rows = -(-height // -(-height // rows))
    e = chain.e
    if e is not None and chain.first is not None:
        fresh = rows * chain.rows_apart
        flops = 2 * chain.n_images * known(prod([x.extent for x in (*e.rows[1:], *e.taps)]) * e.n)
        again_ns = flops * (chain.rows_read(rows) - fresh) / fresh / _FLOPS_PER_NS[e.a.dtype.size_bytes]
        if again_ns > 2 * moved / _BYTES_PER_NS:
            return 0
    return rows


def _strip_bytes(chain: Chain, rows: int) -> int:
    total = 0
    d = chain.d
    if chain.padded is not None:
        total += chain.rows_read(rows) * chain.padded.row * d.a.dtype.size_bytes
    if chain.last is not None:
        total += rows * known(d.rows[2].extent * d.channels) * d.out.dtype.size_bytes
    return total


_Spec = TypeVar("_Spec", Contraction, Depthwise)


def _joined(chain: Chain, rows: int) -> Step:
    d, height = chain.d, chain.d.rows[1].extent
    assert isinstance(height, int)
    n_strips = -(-height // rows)
    strip, image = symbol(PART, 0, n_strips - 1), symbol(BLOCK, 0)
    start = strip * rows
    here: Dim = rows if height % rows == 0 else minimum(rows, height - start)
    operands: dict[Buffer, Operand] = {}
    stages: list[Stage] = []
    local: list[Buffer] = []

    def outside(step: Step, prefix: str, inner: tuple[Buffer, ...]) -> dict[Buffer, Buffer]:
        """Names of the step's buffers that are the step's own."""
        assert isinstance(step.spec, (Contraction, Depthwise))
        named: dict[Buffer, Buffer] = {}
        for b, o in zip(contraction_params(step.spec), step.operands, strict=True):
            if b not in inner:
                named[b] = replace(b, name=f"{prefix}_{b.name}")
                operands[named[b]] = o
        return named

    source, result = d.a, d.out
    if chain.first is not None and chain.padded is not None:
        e, pad = contraction_of(chain.first), chain.padded
        n_rows = chain.rows_read(rows)
        source = Buffer("p", d.a.dtype, (n_rows, pad.row), (pad.row, 1), True)
        local.append(source)
        first = start * chain.rows_apart - pad.top  # of what e makes; some rows of the strip, or all, lie outside
        above = minimum(maximum(-first, 0), n_rows)
        below = minimum(maximum(first + n_rows - e.rows[1].extent, 0), n_rows)
        begin = maximum(first, 0)
        border = None if pad.value is None else _border(source, pad, e, above, below)
        if border is not None and border.body:  # a step may leave out the last of the pads
            stages.append(Stage(border))
        named = outside(chain.first, "e", (e.out,))
        made = _strip_of(e, image, begin, n_rows - above - below, {**named, e.out: source})
        at = above * pad.row + pad.left * pad.pixel
        moved = image * e.rows[0].a + begin * e.rows[1].a
        stages.append(Stage(made, ((named[e.a], moved), (source, at))))
    row = d.rows[2].extent * d.channels
    if chain.last is not None:
        result = Buffer("q", d.out.dtype, (rows, row), (row, 1), True)
        local.append(result)
    inner = ((d.a,) if chain.first is not None else ()) + ((d.out,) if chain.last is not None else ())
    named = outside(chain.middle, "d", inner)
    named = {**named, **({d.a: source} if chain.first else {}), **({d.out: result} if chain.last else {})}
    here_d = _strip_of(d, image, start, here, named)
    if chain.last is not None:
        down, across = here_d.rows
        here_d = replace(here_d, rows=(replace(down, out=row), replace(across, out=d.channels)))
    offsets = []
    if chain.first is None:
        offsets.append((named[d.a], image * d.rows[0].a + start * d.rows[1].a))
    if chain.last is None:
        offsets.append((named[d.out], image * d.rows[0].out + start * d.rows[1].out))
    stages.append(Stage(here_d, tuple(offsets)))
    if chain.last is not None:
        j = contraction_of(chain.last)
        named = outside(chain.last, "j", (j.a,))
        here_j = _strip_of(j, image, start, here, {**named, j.a: result})
        down, across = here_j.rows
        here_j = replace(here_j, rows=(replace(down, a=row), replace(across, a=d.channels)))
        stages.append(Stage(here_j, ((named[j.out], image * j.rows[0].out + start * j.rows[1].out),)))
    images = d.rows[0].extent
    spec = Blocked("k", images, n_strips, (), tuple(stages), tuple(local))
    parts = chain.nodes_of
    ends = chain.last or chain.middle
    return Step(
        "strips", spec, tuple(operands[b] for b in spec.params),
        tuple(dict.fromkeys(s for x in parts for s in x.reads if s not in chain.inner)), ends.writes,
        tuple(dict.fromkeys(n for x in parts for n in x.nodes)), sum((x.flops for x in parts), 0),
        sum((x.bytes for x in parts), 0) - _saved(chain),
    )  # fmt: skip


def _strip_of(c: _Spec, image: Dim, start: Dim, rows: Dim, named: dict[Buffer, Buffer]) -> _Spec:
    """The step for some rows of one image. What its epilogue reads is found by the rows' places in the whole."""
    images, down, across = c.rows
    places = {images.name: image, down.name: symbol(down.name, 0) + start}
    epilogue = None if c.epilogue is None else substitute_expr(c.epilogue, places, named)
    return replace(
        c, rows=(replace(down, extent=rows), across), a=named[c.a], b=named[c.b], out=named[c.out], epilogue=epilogue,
        extra=tuple(named[b] for b in c.extra),
    )  # fmt: skip


def _border(p: Buffer, pad: Padded, e: Contraction, above: Dim, below: Dim) -> Kernel:
    """Fills what the step that makes p does not write of a strip."""
    value, columns = pad.value, e.rows[2].extent
    assert value is not None and isinstance(columns, int) and isinstance(p.shape[0], int)
    right = (pad.left + columns) * pad.pixel

    def run(var: str, row: Dim, begin: Dim, extent: Dim) -> Iterator[For]:
        if extent != 0:
            yield For(var, extent, (Store(p, (row, begin + symbol(var, 0)), value),), "vector")

    r, s, t = symbol("r", 0), symbol("s", 0), symbol("t", 0)
    sides = (*run("i", r, 0, pad.left * pad.pixel), *run("j", r, right, pad.row - right))
    body = [For("r", p.shape[0], sides)] if sides else []
    body += [For("s", above, tuple(run("u", s, 0, pad.row)))] if above != 0 else []
    body += [For("t", below, tuple(run("v", p.shape[0] - below + t, 0, pad.row)))] if below != 0 else []
    return Kernel("k", (p,), tuple(body))


def _saved(chain: Chain) -> Dim:
    """Bytes that no longer pass through memory: p and q, written and read."""
    d = chain.d
    total: Dim = 0
    if (e := chain.e) is not None:
        total = total + e.rows[0].extent * e.rows[1].extent * e.rows[2].extent * e.n * e.out.dtype.size_bytes
        total = total + chain.p.size * d.a.dtype.size_bytes
    if chain.last is not None:
        total = total + 2 * d.rows[0].extent * d.rows[1].extent * d.rows[2].extent * d.channels * d.out.dtype.size_bytes
    for s in chain.nodes_of:
        if isinstance(s.spec, Kernel):
            total = total + s.bytes
    return total
