"""Steps laid out as the words of a program (see `vivace.targets.cpu.program`), cheap to bind to new shapes.

`encode` lays all steps out once. What depends on the run-time dims, on where the arena lies, or on where the words
themselves lie is kept apart, so that `Layout.fill` is a few array operations and one generated Python function that
evaluates the dims: 0.1 ms for 300 steps.

Not handled: programs that change after they were laid out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vivace.base.dims import Apply, Dim, Expr, symbols
from vivace.base.errors import InternalError
from vivace.targets.cpu.program_layout import Header, Op
from vivace.targets.cpu.steps import (
    Arena,
    Arg,
    Call,
    Constant,
    Count,
    Input,
    Jump,
    Kernel,
    Less,
    Output,
    Set,
    Step,
    Unless,
    Value,
)

Words = npt.NDArray[np.int64]

# Steps that share a barrier are never cut into more grains than this together, so that they fit the claim (rule WORD of
# `threads`); the cost of one grain is then far above its claim.
MAX_GRAINS = 65_535


@dataclass(slots=True)
class _Encoder:
    """Grows the words; `program` positions are final, `args` positions count from the end of the program."""

    program: list[int] = field(default_factory=list)
    args: list[int] = field(default_factory=list)
    # (is in args, position, what)
    dims: list[tuple[bool, int, Expr]] = field(default_factory=list)
    arena: list[tuple[bool, int]] = field(default_factory=list)
    patches: list[tuple[bool, int, int, Dim]] = field(default_factory=list)
    args_pointers: list[int] = field(default_factory=list)
    parts: list[tuple[int, int, int]] = field(default_factory=list)  # position of the part, of its group's head, step
    calls: list[tuple[int, int, int, int]] = field(default_factory=list)  # position of fn, step, args position, n_args
    targets: list[tuple[int, int]] = field(default_factory=list)

    def dim(self, in_args: bool, value: Dim) -> None:
        words = self.args if in_args else self.program
        if isinstance(value, Expr):
            self.dims.append((in_args, len(words), value))
        words.append(0 if isinstance(value, Expr) else int(value))

    def ref(self, in_args: bool, ref: Arg, n_inputs: int) -> None:
        words = self.args if in_args else self.program
        match ref:
            case Arena(offset=offset):
                self.arena.append((in_args, len(words)))
                self.dim(in_args, offset)
            case Constant(address=address):
                words.append(address)
            case Value(value=value):
                self.dim(in_args, value)
            case Input(index=index, offset=offset):
                self.patches.append((in_args, len(words), index, offset))
                words.append(0)
            case Output(index=index, offset=offset):
                self.patches.append((in_args, len(words), n_inputs + index, offset))
                words.append(0)

    def pointer_to_args(self, args: Sequence[Arg], n_inputs: int) -> None:
        self.args_pointers.append(len(self.program))
        self.program.append(len(self.args))
        for arg in args:
            self.ref(True, arg, n_inputs)

    def target(self, step: int) -> None:
        self.targets.append((len(self.program), step))
        self.program.append(0)


@dataclass(frozen=True, slots=True)
class Layout:
    """All words of a context: header, program, args, patches; positions count from the start of the header."""

    words: Words
    program: int
    patches: int
    n_patches: int
    own: Words  # positions that hold byte offsets from the start of the words
    arena: Words  # positions that hold byte offsets from the start of the arena
    dims: Words  # positions that hold values of dims
    which: Words  # for each of `dims`, which distinct dim
    evaluate: Callable[[Mapping[str, int]], list[int]]
    parts: Words  # positions of the parts of parallel steps
    first_of_group: Words  # for each part, which part is the first of its group
    last_of_group: Words  # one per group: its last part
    most_grains: Words  # for each part, how many grains it may have
    heads: Words  # one per group: position of its first word
    calls: tuple[tuple[int, int, int, int], ...]  # position of fn, step, position of the args, how many
    step_of_part: dict[int, int]  # by the byte offset of the words `fn, args, ...`

    def fill(self, words: Words, base: int, arena: int, dims: Mapping[str, int]) -> None:
        """Writes program, args and patches for the given dims. The header stays."""
        words[Header.SIZE :] = self.words[Header.SIZE :]
        if self.dims.size:
            words[self.dims] = np.array(self.evaluate(dims), np.int64)[self.which]
        words[self.arena] += arena
        words[self.own] += base
        if self.parts.size:
            units, grain = words[self.parts + 2], words[self.parts + 3]
            grain = np.maximum(np.maximum(grain, 1), -(-units // self.most_grains))
            ends = np.cumsum(-(-units // grain))
            before = ends + units // -grain  # the sum of the grains before each part
            ends -= before[self.first_of_group]
            words[self.parts + 3] = grain
            words[self.parts + 4] = ends
            words[self.heads + 2] = ends[self.last_of_group]


def encode(steps: Sequence[Step], n_inputs: int) -> Layout:
    """Lays steps out as words."""
    e = _Encoder()
    starts: list[int] = []
    jumped_to = {s.target for s in steps if isinstance(s, Jump | Unless | Less)}
    head: int | None = None
    serial_parts: dict[int, int] = {}
    for i, step in enumerate(steps):
        if not (isinstance(step, Kernel) and step.beside and head is not None and i not in jumped_to):
            head = None
        starts.append(len(e.program) if head is None else head)
        match step:
            case Kernel(address=address, args=args, units=units, serial=True):
                e.program.append(Op.SERIAL)
                serial_parts[len(e.program)] = i
                e.program.append(address)
                e.pointer_to_args(args, n_inputs)
                e.dim(False, units)
            case Kernel(address=address, args=args, units=units, grain=grain):
                if head is None:
                    head = len(e.program)
                    e.program += [Op.PARALLEL, 0, 0]
                e.program[head + 1] += 1
                e.parts.append((len(e.program), head, i))
                e.program.append(address)
                e.pointer_to_args(args, n_inputs)
                e.dim(False, units)
                e.dim(False, grain)
                e.program.append(0)
            case Jump(target=target):
                e.program.append(Op.JUMP)
                e.target(target)
            case Unless(flag=flag, width=width, target=target):
                e.program.append(Op.UNLESS)
                e.ref(False, flag, n_inputs)
                e.program.append(width)
                e.target(target)
            case Set(cell=cell, value=value):
                e.program.append(Op.SET)
                e.ref(False, cell, n_inputs)
                e.dim(False, value)
            case Count(cell=cell):
                e.program.append(Op.COUNT)
                e.ref(False, cell, n_inputs)
            case Less(a=a, b=b, target=target):
                e.program.append(Op.LESS)
                e.ref(False, a, n_inputs)
                e.ref(False, b, n_inputs)
                e.target(target)
            case Call(args=args):
                e.program.append(Op.CALL)
                e.calls.append((len(e.program), i, len(e.args), len(args)))
                e.program.append(0)
                e.pointer_to_args(args, n_inputs)
    starts.append(len(e.program))
    e.program.append(Op.END)
    for position, target in e.targets:
        if not 0 <= target <= len(steps):
            raise InternalError(f"a jump goes to step {target}", expected=f"0 to {len(steps)}")
        e.program[position] = 8 * starts[target]
    return _finish(e, serial_parts)


def _finish(e: _Encoder, serial_parts: dict[int, int]) -> Layout:
    program = int(Header.SIZE)
    args = program + len(e.program)
    patches = args + len(e.args)

    def at(in_args: bool, position: int) -> int:
        return position + (args if in_args else program)

    words = [0] * program + e.program + e.args
    own = [program + p for p in e.args_pointers]
    for p in own:
        words[p] = 8 * (args + words[p])
    dims = [(at(in_args, p), d) for in_args, p, d in e.dims]
    for in_args, position, index, offset in e.patches:
        own.append(len(words))
        words += [8 * at(in_args, position), index]
        if isinstance(offset, Expr):
            dims.append((len(words), offset))
        words.append(0 if isinstance(offset, Expr) else int(offset))
    distinct = list(dict.fromkeys(d for _, d in dims))
    number = {d: i for i, d in enumerate(distinct)}
    heads = list(dict.fromkeys(h for _, h, _ in e.parts))
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for i, (_, h, _) in enumerate(e.parts):
        first.setdefault(h, i)
        last[h] = i
    steps = {8 * (program + p): i for p, _, i in e.parts} | {8 * (program + p): i for p, i in serial_parts.items()}
    return Layout(
        words=_ints(words), program=program, patches=patches, n_patches=len(e.patches),
        own=_ints(own), arena=_ints([at(*a) for a in e.arena]),
        dims=_ints([p for p, _ in dims]), which=_ints([number[d] for _, d in dims]), evaluate=dims_function(distinct),
        parts=_ints([program + p for p, _, _ in e.parts]), first_of_group=_ints([first[h] for _, h, _ in e.parts]),
        last_of_group=_ints([last[h] for h in heads]),
        most_grains=_ints([MAX_GRAINS // (last[h] - first[h] + 1) for _, h, _ in e.parts]),
        heads=_ints([program + h for h in heads]),
        calls=tuple((program + fn, i, args + a, n) for fn, i, a, n in e.calls), step_of_part=steps,
    )  # fmt: skip


def _ints(values: Sequence[int]) -> Words:
    return np.array(values, np.int64)


def dims_function(dims: Sequence[Dim]) -> Callable[[Mapping[str, int]], list[int]]:
    """One compiled Python function that evaluates many dims: about 0.1 us each that differs, where `dims.evaluate`
    takes 10.

    The function raises KeyError for a symbol without a value.
    """
    names = sorted({s.name for d in dims for s in symbols(d)})
    local = {name: f"v{i}" for i, name in enumerate(names)}  # names from a model never reach the source text

    def text(d: Dim) -> str:
        if not isinstance(d, Expr):
            return f"({int(d)})"
        return "(" + "+".join("*".join([str(c), *(atom(a) for a in m)]) for m, c in d.terms) + ")"

    def atom(a: object) -> str:
        if isinstance(a, Apply):
            x, y = text(a.a), text(a.b)
            return f"{a.fn}({x},{y})" if a.fn in ("min", "max") else f"({x}{a.fn}{y})"
        return local[a.name]  # type: ignore[attr-defined]

    distinct = {d: f"d{i}" for i, d in enumerate(dict.fromkeys(d for d in dims if isinstance(d, Expr)))}
    lines = ["def evaluate(env):"]
    lines += [f"    {local[name]} = env[{i}]" for i, name in enumerate(names)]
    lines += [f"    {name} = {text(d)}" for d, name in distinct.items()]
    lines += ["    return [" + ",".join(distinct[d] if isinstance(d, Expr) else str(int(d)) for d in dims) + "]"]
    scope: dict[str, Callable[[list[int]], list[int]]] = {}
    exec(compile("\n".join(lines), "<dims>", "exec"), scope)
    evaluate = scope["evaluate"]
    return lambda env: evaluate([env[name] for name in names])
