"""Steps laid out as the words of a program (see `vivace.targets.cpu.program`), cheap to bind to new shapes.

`encode` lays all steps out once. What depends on the run-time dims or on where the arena lies is kept apart, as
formulas and the places of their values, so that a new shape is two native functions (`formulas`): 0.02 ms for 800
steps.

Not handled: programs that change after they were laid out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vivace.base.dims import Dim, Expr
from vivace.base.errors import InternalError
from vivace.targets.cpu.formulas import Formulas, Frame, Numbers, Words, formulas_of
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
    arena: list[tuple[bool, int, Dim]] = field(default_factory=list)
    patches: list[tuple[bool, int, int, Dim]] = field(default_factory=list)
    args_pointers: list[int] = field(default_factory=list)
    # position of the part, of its group's head, step, units, grain
    parts: list[tuple[int, int, int, Dim, Dim]] = field(default_factory=list)
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
                self.arena.append((in_args, len(words), offset))
                words.append(0)
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
    formulas: Formulas
    places: Numbers  # rows (position, place of its value in the table of formulas)
    n_in_arena: int  # the first of them hold byte offsets from the start of the arena
    parts: Numbers  # rows (position of the part, of its group's head, places of units and grain, most grains)
    extra: tuple[int, ...]  # places of the values of the other dims that were given
    calls: tuple[tuple[int, int, int, int], ...]  # position of fn, step, position of the args, how many
    step_of_part: dict[int, int]  # by the byte offset of the words `fn, args, ...`

    def frame(self, program: int, values: Words) -> Words:
        """What native code is told to fill the words at the address `program` from a table of values."""
        frame = self.formulas.frame(values)
        frame[Frame.PROGRAM] = program
        frame[Frame.PLACES], frame[Frame.N_PLACES] = self.places.ctypes.data, len(self.places)
        frame[Frame.N_IN_ARENA] = self.n_in_arena
        frame[Frame.PARTS], frame[Frame.N_PARTS] = self.parts.ctypes.data, len(self.parts)
        return frame


def encode(steps: Sequence[Step], n_inputs: int, extra: Sequence[Dim] = (), first: Sequence[str] = ()) -> Layout:
    """Lays steps out as words, with `extra` dims to evaluate beside theirs. The symbols named `first` come first in the
    table of formulas."""
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
                e.parts.append((len(e.program), head, i, units, grain))
                e.program.append(address)
                e.pointer_to_args(args, n_inputs)
                e.dim(False, units)
                e.program += [0, 0]
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
            case Call(args=args, due=due):
                e.program.append(Op.CALL)
                e.calls.append((len(e.program), i, len(e.args), len(args)))
                e.program.append(0)
                e.pointer_to_args(args, n_inputs)
                e.dim(False, due)
    starts.append(len(e.program))
    e.program.append(Op.END)
    for position, target in e.targets:
        if not 0 <= target <= len(steps):
            raise InternalError(f"a jump goes to step {target}", expected=f"0 to {len(steps)}")
        e.program[position] = 8 * starts[target]
    return _finish(e, serial_parts, extra, first)


def _finish(e: _Encoder, serial_parts: dict[int, int], extra: Sequence[Dim], first: Sequence[str]) -> Layout:
    program = int(Header.SIZE)
    args = program + len(e.program)
    patches = args + len(e.args)

    def at(in_args: bool, position: int) -> int:
        return position + (args if in_args else program)

    words = [0] * program + e.program + e.args
    own = [program + p for p in e.args_pointers]
    for p in own:
        words[p] = 8 * (args + words[p])
    arena = [(at(in_args, p), d) for in_args, p, d in e.arena]
    dims: list[tuple[int, Dim]] = [(at(in_args, p), d) for in_args, p, d in e.dims]
    for in_args, position, index, offset in e.patches:
        own.append(len(words))
        words += [8 * at(in_args, position), index]
        if isinstance(offset, Expr):
            dims.append((len(words), offset))
        words.append(0 if isinstance(offset, Expr) else int(offset))
    filled = arena + dims
    shared = [d for _, _, _, units, grain in e.parts for d in (units, grain)]
    formulas = formulas_of([*(d for _, d in filled), *shared, *extra], first)
    values = formulas.results.tolist()
    places = [(p, value) for (p, _), value in zip(filled, values)]
    at_parts = values[len(filled) :]
    sizes = Counter(head for _, head, *_ in e.parts)
    parts = [
        (program + p, program + head, at_parts[2 * i], at_parts[2 * i + 1], MAX_GRAINS // sizes[head])
        for i, (p, head, *_) in enumerate(e.parts)
    ]
    steps = {8 * (program + p): i for p, _, i, *_ in e.parts} | {8 * (program + p): i for p, i in serial_parts.items()}
    return Layout(
        words=_ints(words), program=program, patches=patches, n_patches=len(e.patches), own=_ints(own),
        formulas=formulas, places=np.array(places, np.int32).reshape(-1, 2), n_in_arena=len(arena),
        parts=np.array(parts, np.int32).reshape(-1, 5), extra=tuple(values[len(filled) + len(shared) :]),
        calls=tuple((program + fn, i, args + a, n) for fn, i, a, n in e.calls), step_of_part=steps,
    )  # fmt: skip


def _ints(values: Sequence[int]) -> Words:
    return np.array(values, np.int64)
