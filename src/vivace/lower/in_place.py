"""Results written over an operand that nobody reads any more.

    before: y = relu(conv(a, w) + x)  in memory of its own      after: y lies where x lay

Rules:
* LAST, FIRST: nothing reads the operand after the step, and nothing touched the result before it; either counts a
  branch or loop as one.
* SAME PLACE: each element of the result comes from the operand's element at the same address and no other, and is
  stored once, after that was read: the epilogues of products and convolutions promise it (`contraction_epilogue`).
* WHOLE: a row of results fills a vector. Of shorter rows a load meets the masked store of the row before it, which the
  CPU does not forward: 8 channels in an angle classifier took 16 us in bytes and 8 in f32, and 3.4 and 4.1 apart.
* ONCE: the step reads the operand as nothing else, not as A or B too.

What it brings, in bytes of arena: ResNet-50 26 % less, MiniLM 16 %; other models are widest elsewhere. Steps of
element-wise nodes alone are left as they are: no model in `benchmarks/models` would need a byte less.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from vivace.base.dims import Dim, substitute, symbol
from vivace.loops.contraction import Contraction, Depthwise, contraction_params
from vivace.loops.kernel import Load, walk
from vivace.lower.plan import Branch, Demand, Foreign, Instruction, Loop, Operand, Plan, Step
from vivace.lower.views import Storage, View

WIDEST = 16  # lanes of a vector of f32


def write_in_place(plan: Plan) -> Plan:
    """The plan with the storages of some results replaced by those of operands."""
    touched: dict[Storage, list[int]] = {}
    for i, item in enumerate(plan.body):
        for s in storages_of(item):
            touched.setdefault(s, []).append(i)
    lies_in: dict[Storage, Storage] = {}
    taken: set[Storage] = set()
    for i, item in enumerate(plan.body):
        if not isinstance(item, Step) or len(item.writes) != 1 or item.writes[0].kind != "arena":
            continue
        out = item.writes[0]
        for old in _candidates(item):
            is_last = touched[old][-1] == i and touched[out][0] == i  # rule LAST, FIRST
            if is_last and old not in taken and old.bytes == out.bytes and old.dtype is out.dtype:
                lies_in[out] = lies_in.get(old, old)
                taken.add(old)
                break
    return _replaced(plan, lies_in) if lies_in else plan


def _candidates(step: Step) -> Iterator[Storage]:
    """Arena storages that the step reads where it writes (rules SAME PLACE, WHOLE, ONCE)."""
    c = step.spec
    if not isinstance(c, (Contraction, Depthwise)) or c.epilogue is None:
        return
    columns = c.n if isinstance(c, Contraction) else c.channels
    if isinstance(columns, int) and columns < WIDEST:  # rule WHOLE
        return
    axes = [*(c.batch if isinstance(c, Contraction) else ()), *c.rows]
    ones: dict[str, Dim] = {x.name: 0 for x in axes if x.extent == 1}
    written: Dim = symbol("n" if isinstance(c, Contraction) else "c", 0)
    for x in axes:
        if x.extent != 1:
            written = written + x.out * symbol(x.name, 0)
    params = dict(zip(contraction_params(c), step.operands, strict=True))
    out = params[c.out]
    for buffer in c.extra:
        here = params[buffer]
        loads = [e for e in walk(c.epilogue) if isinstance(e, Load) and e.buffer == buffer]
        read = {substitute(sum((i * s for i, s in zip(e.index, buffer.strides)), 0), ones) for e in loads}
        is_once = sum(o.storage is here.storage for o in step.operands) == 1
        is_same = here.offset == out.offset and read == {written} and not any(e.inside for e in loads)
        if here.storage.kind == "arena" and is_once and is_same:
            yield here.storage


def storages_of(item: Instruction) -> set[Storage]:
    """All that an instruction reads or writes."""
    match item:
        case Step():
            return {o.storage for o in item.operands}
        case Foreign():
            return {v.storage for v in (*item.inputs, *item.outputs) if v is not None and v.storage is not None}
        case Demand():
            return set()
        case Branch():
            inside = {s for i in (*item.then, *item.otherwise) for s in storages_of(i)}
            return {item.cond.storage, *inside}
        case Loop():
            own = {item.counter, item.limit.storage, *item.carried, *((item.go,) if item.go else ())}
            return own | {s for i in item.body for s in storages_of(i)}


def _replaced(plan: Plan, lies_in: Mapping[Storage, Storage]) -> Plan:
    def storage(s: Storage) -> Storage:
        return lies_in.get(s, s)

    def operand(o: Operand) -> Operand:
        return replace(o, storage=storage(o.storage))

    def view(v: View) -> View:
        return v if v.storage is None else replace(v, storage=storage(v.storage))

    def line(items: Sequence[Instruction]) -> tuple[Instruction, ...]:
        return tuple(map(instruction, items))

    def instruction(i: Instruction) -> Instruction:
        match i:
            case Step():
                reads, writes = tuple(map(storage, i.reads)), tuple(map(storage, i.writes))
                return replace(i, operands=tuple(map(operand, i.operands)), reads=reads, writes=writes)
            case Foreign():
                inputs = tuple(None if v is None else view(v) for v in i.inputs)
                return replace(i, inputs=inputs, outputs=tuple(map(view, i.outputs)))
            case Demand():
                return i
            case Branch():
                return replace(i, cond=operand(i.cond), then=line(i.then), otherwise=line(i.otherwise))
            case Loop():
                go = None if i.go is None else storage(i.go)
                carried = tuple(map(storage, i.carried))
                limit, body = operand(i.limit), line(i.body)
                return replace(i, counter=storage(i.counter), limit=limit, go=go, body=body, carried=carried)

    return replace(
        plan,
        body=line(plan.body),
        storages=tuple(s for s in plan.storages if s not in lies_in),
        views={value: view(v) for value, v in plan.views.items()},
    )
