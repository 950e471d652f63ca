"""Products of which each reads rows of the one before, a block of rows at a time: both halves of an MLP as one step.

    before   h = gelu(x W1)      y = h W2 + x                              h in memory, whole
    after    for each block of rows:   its rows of h, in scratch of the thread;   its rows of y

    before   g = silu(x W1)      h = g * (x W2)      y = h W3              a gate: g and h stay near

Rules:
* ALONE: nothing else reads or writes g or h, and nothing in between writes what the products read.
* SAME SUMS: a row has the terms of its sums in the same order in any block.
* PAYS: only where g and h together would not stay in the second-level cache, blocks whose h fills three eighths of it
  have rows enough to be worth reading the weights once more (MOST_WEIGHTS), and every thread gets as many of them.

Measured with blocks of 3/8 of 2 MiB, one thread, over the products apart: 1500 rows of 384 -> 1536 -> 384 take 0.93 of
the time in f32 and 0.98 in bf16, 2048 rows 0.98 and 0.95; 512 rows of a gate, 576 -> 1536 -> 576, 0.97 and 0.96. But
197 rows of 768 -> 3072 -> 768, in blocks of 66, take 1.19 in f32: there the weights are read too often.

Not handled: rows whose number only shows when the model runs, weights that are computed. A site that is joined is made
as its tiles are chosen by default: it is no site of tuning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vivace.base.dims import Dim, linear, symbol, symbols
from vivace.base.machine import Machine, host
from vivace.loops.blocked import BLOCK, Blocked, Stage, block_sizes
from vivace.loops.contraction import Contraction, contraction_params, merge_axes, substitute_expr
from vivace.loops.kernel import Buffer, Index, Load, walk
from vivace.lower.joining import Joined, join_steps, may_move
from vivace.lower.plan import Instruction, Plan, Step
from vivace.lower.views import Storage

WHOLE = 64  # columns of h are a multiple: products of bytes read so many at once
MOST_WEIGHTS = 320  # bytes that a block has at least in a column of x, for each weight that it reads
BLOCKS_OF_A_THREAD = 4  # where there are several threads


def in_row_blocks(plan: Plan, threads: int = 1, machine: Machine | None = None) -> Plan:
    """The plan with products joined to those that read their rows, where it pays."""
    here = machine or host()

    def join(body: Sequence[Instruction | None], touched: Mapping[Storage, Sequence[int]], at: int) -> Joined | None:
        chain = _chain_at(body, touched, at)
        rows = 0 if chain is None else _rows_per_block(chain, threads, here)
        return Joined(_joined(chain, rows), chain.steps, chain.inner) if chain is not None and rows else None

    return join_steps(plan, join)


@dataclass(frozen=True, slots=True)
class _Product:
    """A product with one axis of rows. `per_row`: what a row adds to the address in each buffer of its epilogue."""

    step: Step
    c: Contraction
    per_row: dict[Buffer, Dim]

    def storage(self, b: Buffer) -> Storage:
        return self.step.operands[contraction_params(self.c).index(b)].storage

    def offset(self, b: Buffer) -> Dim:
        return self.step.operands[contraction_params(self.c).index(b)].offset

    @property
    def n_rows(self) -> int:
        assert isinstance(self.c.rows[0].extent, int)
        return self.c.rows[0].extent

    @property
    def row_bytes(self) -> int:
        assert isinstance(self.c.n, int)
        return self.c.n * self.c.out.dtype.size_bytes


@dataclass(frozen=True, slots=True)
class _Chain:
    """Products in order, by their positions; the last one reads what the one before makes. `gate` is the buffer, in the
    epilogue of that one, that the first of three makes.
    """

    products: tuple[_Product, ...]
    steps: tuple[int, ...]
    gate: Buffer | None

    @property
    def inner(self) -> set[Storage]:
        return {p.storage(p.c.out) for p in self.products[:-1]}


def _product(item: Instruction | None) -> _Product | None:
    """A step as a product of rows by constant weights, with as few axes as it can have."""
    if not isinstance(item, Step) or not isinstance(item.spec, Contraction) or item.spec.packing.kind != "panels":
        return None
    c = merge_axes(item.spec)
    taps = [t for t in c.taps if t.extent != 1]
    if c.batch or len(c.rows) != 1 or len(taps) != 1 or taps[0].a != 1:
        return None
    sizes = (c.rows[0].extent, c.rows[0].a, c.rows[0].out, taps[0].extent, c.n)
    if not all(isinstance(d, int) for d in sizes) or contraction_params(c) != contraction_params(item.spec):
        return None
    name, per_row = c.rows[0].name, dict[Buffer, Dim]()
    for e in walk(c.epilogue) if c.epilogue is not None else ():
        if isinstance(e, Index) and any(s.name == name for s in symbols(e.dim)):
            return None
        if isinstance(e, Load):
            found = linear(sum((i * s for i, s in zip(e.index, e.buffer.strides)), 0), name)
            if e.inside or found is None or per_row.setdefault(e.buffer, found[0]) != found[0]:
                return None
    return _Product(item, c, per_row)


def _chain_at(body: Sequence[Instruction | None], touched: Mapping[Storage, Sequence[int]], at: int) -> _Chain | None:
    """The products to join with the one at a position: the one that makes its rows, and that one's gate."""
    last = _product(body[at])
    if last is None:
        return None
    position = _maker(touched, last.storage(last.c.a), at)
    first = None if position is None else _product(body[position])
    if position is None or first is None or not _hands_on(first, last, last.c.a):
        return None
    if last.c.rows[0].a != first.c.rows[0].out or last.c.taps[0].extent != first.c.n:
        return None
    chain = _Chain((first, last), (position, at), None)
    for b in first.c.extra:
        k = _maker(touched, first.storage(b), position)
        gate = None if k is None else _product(body[k])
        if k is not None and gate is not None and _hands_on(gate, first, b) and _row_axis(gate, b) is not None:
            if first.per_row.get(b) == gate.c.rows[0].out:
                chain = _Chain((gate, first, last), (k, position, at), b)
                break
    return chain if may_move(body, chain.steps) else None


def _row_axis(gate: _Product, b: Buffer) -> int | None:
    """The axis of a buffer that walks the rows of the product that makes it."""
    n, stride = gate.c.n, gate.c.rows[0].out
    if b.shape[-1:] != (n,) or b.strides[-1] != 1:
        return None
    return next((i for i in reversed(range(len(b.shape) - 1)) if b.strides[i] == stride), None)


def _maker(touched: Mapping[Storage, Sequence[int]], s: Storage, reader: int) -> int | None:
    """The step that makes what only one reads (rule ALONE)."""
    found = touched[s]
    return found[0] if s.kind == "arena" and len(found) == 2 and found[1] == reader else None


def _hands_on(first: _Product, then: _Product, b: Buffer) -> bool:
    """Whether the rows of one are the rows of `b` of the other, and nothing else of it is there."""
    out = first.c.out
    is_once = all(sum(o.storage is first.storage(out) for o in p.step.operands) == 1 for p in (first, then))
    is_here = first.step.writes == (first.storage(out),) and first.offset(out) == then.offset(b)
    n = first.c.n
    return is_once and is_here and first.n_rows == then.n_rows and isinstance(n, int) and n % WHOLE == 0


def _rows_per_block(chain: _Chain, threads: int, machine: Machine) -> int:
    """Rows of a block; 0 where it does not pay."""
    makers, l2 = chain.products[:-1], machine.cache_bytes(2)
    total = makers[0].n_rows
    if sum(p.row_bytes for p in makers) * total <= l2:
        return 0
    most = l2 * 3 // 8 // max(p.row_bytes for p in makers)
    if most == 0:
        return 0
    n_blocks = -(-total // most)
    if threads > 1:
        n_blocks = -(-max(n_blocks, BLOCKS_OF_A_THREAD * threads) // threads) * threads
    rows = -(-total // n_blocks)
    return rows if rows * chain.products[-1].c.a.dtype.size_bytes >= MOST_WEIGHTS else 0


def _joined(chain: _Chain, rows: int) -> Step:
    total, block = chain.products[0].n_rows, symbol(BLOCK, 0)
    n_blocks, start = -(-total // rows), block * rows
    local: dict[Storage, Buffer] = {}
    for p in chain.products[:-1]:
        c = p.c
        h = Buffer("h", c.out.dtype, (rows, c.n), (c.rows[0].out, 1), True)
        if chain.gate is not None and p is chain.products[0]:  # as it is read
            axis = _row_axis(p, chain.gate)
            shape = (*(rows if i == axis else 1 for i in range(len(chain.gate.shape) - 1)), c.n)
            h = replace(chain.gate, name="g", shape=shape, writable=True)
        local[p.storage(c.out)] = h
    named: list[dict[Buffer, Buffer]] = []
    operands = {}
    for k, p in enumerate(chain.products):
        names = {}
        for b, o in zip(contraction_params(p.c), p.step.operands, strict=True):
            names[b] = local.get(o.storage) or replace(b, name=f"p{k}_{b.name}")
            if o.storage not in local:
                operands[names[b]] = o
        named.append(names)
    stages: list[Stage] = []
    for here, when in block_sizes(total, rows, n_blocks, block):
        for p, names in zip(chain.products, named, strict=True):
            row = p.c.rows[0]
            apart = {p.c.a: row.a, p.c.out: row.out, **p.per_row}
            offsets = tuple((names[b], start * d) for b, d in apart.items() if names[b] in operands and d != 0)
            epilogue = None if p.c.epilogue is None else substitute_expr(p.c.epilogue, {}, names)
            product = replace(
                p.c, rows=(replace(row, extent=here),), a=names[p.c.a], b=names[p.c.b], out=names[p.c.out],
                epilogue=epilogue, extra=tuple(names[b] for b in p.c.extra),
            )  # fmt: skip
            stages.append(Stage(product, offsets, when))
    spec = Blocked("k", n_blocks, 1, (), tuple(stages), tuple(local.values()))
    parts = [p.step for p in chain.products]
    saved = sum(2 * p.row_bytes * total for p in chain.products[:-1])
    return Step(
        "row_blocks", spec, tuple(operands[b] for b in spec.params),
        tuple(dict.fromkeys(s for x in parts for s in x.reads if s not in chain.inner)), parts[-1].writes,
        tuple(dict.fromkeys(n for x in parts for n in x.nodes)), sum((x.flops for x in parts), 0),
        sum((x.bytes for x in parts), 0) - saved,
    )  # fmt: skip
