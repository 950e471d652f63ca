"""Steps of a program as data. A step names its kernel by address and its operands by `Ref`.

Rules:
* BESIDE: a kernel step with `beside=True` is independent of the kernel steps before it, back to the first without, and
  shares their barrier. A serial step ends such a group.
* TARGET: jumps name steps by their index; the number of steps is the end. A step that is a target starts a group.
* LAID OUT: nothing here is read while a program runs; `vivace.targets.cpu.words` turns steps into words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vivace.base.dims import Dim


@dataclass(frozen=True, slots=True)
class Arena:
    """A place in the context's arena."""

    offset: Dim


@dataclass(frozen=True, slots=True)
class Constant:
    """An absolute address that outlives the executable."""

    address: int


@dataclass(frozen=True, slots=True)
class Input:
    index: int
    offset: Dim = 0


@dataclass(frozen=True, slots=True)
class Output:
    index: int
    offset: Dim = 0


@dataclass(frozen=True, slots=True)
class Value:
    """An integer: the value of a dim, usually."""

    value: Dim


Ref = Arena | Constant | Input | Output
Arg = Ref | Value


@dataclass(frozen=True, slots=True)
class Kernel:
    """Run `units` units of the kernel at `address`; `grain` of them are the least worth handing to a thread at once."""

    address: int
    args: tuple[Arg, ...]
    units: Dim = 1
    grain: Dim = 1
    serial: bool = False
    beside: bool = False


@dataclass(frozen=True, slots=True)
class Jump:
    target: int


@dataclass(frozen=True, slots=True)
class Unless:
    """Jump when the flag, `width` bytes (1 or 8), is zero."""

    flag: Ref
    target: int
    width: int = 1


@dataclass(frozen=True, slots=True)
class Set:
    """Write an integer to a 64-bit cell."""

    cell: Ref
    value: Dim


@dataclass(frozen=True, slots=True)
class Count:
    """Add one to a 64-bit cell."""

    cell: Ref


@dataclass(frozen=True, slots=True)
class Less:
    """Go on while cell a < cell b (64-bit, signed), else jump."""

    a: Ref
    b: Ref
    target: int


@dataclass(frozen=True, slots=True)
class Call:
    """Call Python on the caller's thread with the resolved args (addresses and values), unless `due` is 0; what it
    raises ends the run."""

    function: Callable[[Sequence[int]], None]
    args: tuple[Arg, ...] = ()
    due: Dim = 1


Step = Kernel | Jump | Unless | Set | Count | Less | Call
