"""Which steps of a plan hand a tensor to each other that nobody else sees: the convolutions around a depthwise one.

    before   p = pads of e(x)      q = depthwise(p)      y = j(q)

`strips` joins them. Here are its rule ALONE and what it takes for granted: images of rows and columns, of which
only the number may be unknown, and a last convolution of single pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vivace.base.dims import Dim, exact_div
from vivace.loops.contraction import Contraction, Depthwise, contraction_params
from vivace.loops.kernel import Buffer, Const, For, Kernel, Store
from vivace.lower.joining import may_move
from vivace.lower.plan import Instruction, Operand, Step
from vivace.lower.views import Storage


@dataclass(frozen=True, slots=True)
class Padded:
    """Where a step writes into p: rows and columns before it, and what stands around it."""

    top: int
    left: int
    row: int  # elements of a row of p
    pixel: int
    value: Const | None


@dataclass(frozen=True, slots=True)
class Chain:
    """Steps to join, by their positions in order, the last of which is where the joined one stands."""

    first: Step | None
    padded: Padded | None
    middle: Step
    last: Step | None
    steps: tuple[int, ...]
    nodes_of: tuple[Step, ...]

    @property
    def d(self) -> Depthwise:
        assert isinstance(self.middle.spec, Depthwise)
        return self.middle.spec

    @property
    def e(self) -> Contraction | None:
        return None if self.first is None else contraction_of(self.first)

    @property
    def j(self) -> Contraction | None:
        return None if self.last is None else contraction_of(self.last)

    @property
    def p(self) -> Storage:
        return operand_of(self.middle, self.d.a).storage

    @property
    def q(self) -> Storage:
        return operand_of(self.middle, self.d.out).storage

    @property
    def inner(self) -> set[Storage]:
        return ({self.p} if self.first else set()) | ({self.q} if self.last else set())

    @property
    def n_images(self) -> int:
        """At least so many."""
        n = self.d.rows[0].extent
        return n if isinstance(n, int) else 1

    @property
    def inner_bytes(self) -> int:
        """Of what the steps hand to each other."""
        total = 0
        for s in self.inner:
            per_image = exact_div(s.bytes, self.d.rows[0].extent)
            assert per_image is not None
            total += known(per_image) * self.n_images
        return total

    def rows_read(self, rows: int) -> int:
        """Rows of p for so many of q."""
        down, tap = self.d.rows[1], self.d.taps[0]
        assert isinstance(down.a, int) and isinstance(tap.a, int) and isinstance(tap.extent, int)
        assert self.padded is not None
        return ((rows - 1) * down.a + (tap.extent - 1) * tap.a) // self.padded.row + 1

    @property
    def rows_apart(self) -> int:
        """Rows of p from one row of q to the next."""
        assert isinstance(self.d.rows[1].a, int) and self.padded is not None
        return self.d.rows[1].a // self.padded.row


def contraction_of(s: Step) -> Contraction:
    """What a step that is one computes."""
    assert isinstance(s.spec, Contraction)
    return s.spec


def known(d: Dim) -> int:
    """A size that does not depend on the inputs."""
    assert isinstance(d, int)
    return d


def operand_of(s: Step, b: Buffer) -> Operand:
    """Where a parameter of a contraction or a depthwise convolution lies."""
    assert isinstance(s.spec, (Contraction, Depthwise))
    return s.operands[contraction_params(s.spec).index(b)]


def chain_at(body: Sequence[Instruction | None], touched: Mapping[Storage, Sequence[int]], at: int) -> Chain | None:
    """The steps to join with the depthwise convolution at a position of the plan's body. `touched` are the positions
    that touch each storage."""
    middle = body[at]
    assert isinstance(middle, Step) and isinstance(middle.spec, Depthwise)
    d = middle.spec
    if not _is_image(d) or len(d.taps) != 2:
        return None
    before = _before(body, touched, at, middle, d)
    after = _after(body, touched, at, middle, d)
    for first, last in ((before, after), (None, after), (before, None)):  # all of it, or what is left
        if first is None and last is None:
            continue
        steps = [*(first[1] if first else ()), at, *([last] if last is not None else ())]
        if not may_move(body, steps):
            continue
        around = [body[k] for k in steps]
        end = None if last is None else body[last]
        assert end is None or isinstance(end, Step)
        return Chain(
            first[0] if first else None, first[2] if first else None, middle, end, tuple(steps),
            tuple(s for s in around if isinstance(s, Step)),
        )  # fmt: skip
    return None


def _is_image(c: Contraction | Depthwise) -> bool:
    """Whether its rows are images, however many, of rows and columns of known sizes."""
    axes = (*c.rows, *c.taps)
    sizes = [*(x.extent for x in axes[1:]), *(v for x in axes for v in (x.a, x.b, x.out))]
    width = c.n if isinstance(c, Contraction) else c.channels
    is_known = all(isinstance(v, int) for v in (*sizes, width))
    return is_known and len(c.rows) == 3 and all(x.extent != 0 for x in axes)


def _has_images(s: Storage, d: Depthwise) -> bool:
    """Whether a storage is as large as its images."""
    return isinstance(exact_div(s.size, d.rows[0].extent), int)


def _is_inner(touched: Mapping[Storage, Sequence[int]], s: Storage, steps: Sequence[int]) -> bool:
    return s.kind == "arena" and touched[s] == list(steps)


def _after(
    body: Sequence[Instruction | None], touched: Mapping[Storage, Sequence[int]], at: int, middle: Step, d: Depthwise
) -> int | None:
    """The step that alone reads what the convolution makes, pixel by pixel."""
    q = operand_of(middle, d.out)
    last = touched[q.storage][-1]
    step = body[last]
    if not isinstance(step, Step) or not isinstance(step.spec, Contraction):
        return None
    j = step.spec
    if not _is_inner(touched, q.storage, (at, last)) or not _has_images(q.storage, d):
        return None
    if not _is_image(j) or j.batch or operand_of(step, j.a) != q:
        return None
    same = all(x.extent == y.extent and (x.a == y.out or x.extent == 1) for x, y in zip(j.rows, d.rows, strict=True))
    is_pixel = all(t.extent == 1 for t in j.taps[:-1]) and j.taps[-1].extent == d.channels
    read = [o.storage for b, o in zip(contraction_params(j), step.operands, strict=True) if b != j.a]
    return last if same and is_pixel and q.storage not in read else None


def _before(
    body: Sequence[Instruction | None], touched: Mapping[Storage, Sequence[int]], at: int, middle: Step, d: Depthwise
) -> tuple[Step, list[int], Padded] | None:
    """The step that alone makes what the convolution reads, those that pad it, and their positions."""
    p = operand_of(middle, d.a)
    *writers, reader = touched[p.storage]
    steps = [body[k] for k in writers]
    makers = [s for s in steps if isinstance(s, Step) and isinstance(s.spec, Contraction)]
    fills = [_fill_value(s) for s in steps if s not in makers]
    if reader != at or len(makers) != 1 or None in fills or len(set(fills)) > 1 or p.offset != 0:
        return None
    if sum(o.storage is p.storage for o in middle.operands) != 1:  # its epilogue adds what it convolves
        return None
    e = contraction_of(makers[0])
    out, size = operand_of(makers[0], e.out), p.storage.size
    if not _is_image(e) or e.batch or p.storage.kind != "arena" or makers[0].writes != (p.storage,):
        return None
    if sum(o.storage is p.storage for o in makers[0].operands) != 1 or not isinstance(out.offset, int):
        return None
    images, down, across = e.rows
    row, pixel, top = down.out, across.out, 0
    assert isinstance(row, int) and isinstance(pixel, int)
    if e.n != pixel or d.channels != pixel or row % pixel or not _has_images(p.storage, d):
        return None
    top, rest = divmod(out.offset, row)
    steps_of_d = [x.a for x in (d.rows[1], d.taps[0])]
    if any(known(a) % row for a in steps_of_d) or any(known(x.a) % pixel for x in (d.rows[2], d.taps[1])):
        return None
    if images.extent != d.rows[0].extent or (images.extent != 1 and images.out != d.rows[0].a):
        return None
    value = fills[0] if fills else None
    covers = images.extent * down.extent * across.extent * pixel == size
    if value is None and not covers:
        return None
    return makers[0], writers, Padded(top, rest // pixel, row, pixel, value)


def _fill_value(s: Instruction | None) -> Const | None:
    """What a step stores everywhere, if it is one that only fills."""
    if not isinstance(s, Step) or not isinstance(s.spec, Kernel) or len(s.spec.params) != 1 or s.reads:
        return None
    body = s.spec.body
    while len(body) == 1 and isinstance(body[0], For):
        body = body[0].body
    store = body[0] if len(body) == 1 else None
    return store.value if isinstance(store, Store) and isinstance(store.value, Const) else None
