"""The plan: the last target-neutral artefact. Ordered steps over storages; sizes and offsets are dims until a binding
fixes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vivace.base.dims import Dim
from vivace.graph.graph import Graph, Node, Value
from vivace.loops.blocked import Blocked
from vivace.loops.blockwise import BlockwiseProduct
from vivace.loops.contraction import Contraction, Depthwise
from vivace.loops.digits import Digits
from vivace.loops.kernel import Kernel
from vivace.loops.pack import Pack
from vivace.loops.split import Split
from vivace.lower.choices import Site
from vivace.lower.image import Appended
from vivace.lower.views import Storage, View

Spec = Kernel | Contraction | Depthwise | BlockwiseProduct | Blocked | Pack | Split | Digits


@dataclass(frozen=True, slots=True)
class Operand:
    """The storage behind one kernel parameter, and where the parameter's element 0 lies in it, in elements."""

    storage: Storage
    offset: Dim = 0


@dataclass(frozen=True, slots=True)
class Step:
    """One kernel call.

    `operands` follow the kernel's params; `writes` are the storages it changes. `flops` and `bytes` are the counted
    work: each operand's elements once. `nodes` are the core nodes it computes, from which the ONNX names come. `site`
    is there where the step could be made in several ways.
    """

    label: str
    spec: Spec
    operands: tuple[Operand, ...]
    reads: tuple[Storage, ...]
    writes: tuple[Storage, ...]
    nodes: tuple[Node, ...]
    flops: Dim
    bytes: Dim
    site: Site | None = None


@dataclass(frozen=True, slots=True)
class Demand:
    """At the head of a branch or a loop's body that is meant for some sizes only: where `lacks` is not 0 the run ends
    with an error that names the `nodes` and what is `expected`."""

    lacks: Dim
    expected: str
    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Branch:
    """`if`: run `then` where the bool at `cond` holds, else `otherwise`. Both write the same storages."""

    label: str
    cond: Operand
    then: tuple[Instruction, ...]
    otherwise: tuple[Instruction, ...]
    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Loop:
    """`loop`: with the i64 in `counter` from 0, run `body` while it is below the i64 at `limit` and the bool in `go`
    holds (None: always).

    What the body changes and reads again in the next turn lies in storages of its own (`carried`), which live through
    the whole loop.
    """

    label: str
    counter: Storage
    limit: Operand
    go: Storage | None
    body: tuple[Instruction, ...]
    carried: tuple[Storage, ...]
    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Foreign:
    """A node that another provider runs: dense inputs and outputs, called from the thread that runs the engine."""

    label: str
    node: Node
    inputs: tuple[View | None, ...]
    outputs: tuple[View, ...]
    reason: str


Instruction = Step | Branch | Loop | Foreign | Demand


@dataclass(frozen=True, slots=True)
class Plan:
    """A lowered graph. `inputs` and `outputs` are the graph's values; their storages have kind input and output.

    `graph` is what was lowered, after its last rewrites, and `views` says where its values lie.
    """

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    body: tuple[Instruction, ...]
    storages: tuple[Storage, ...]
    graph: Graph
    views: Mapping[Value, View]
    notes: tuple[str, ...] = field(default=())
    appended: tuple[Appended, ...] = ()


def steps_of(body: tuple[Instruction, ...]) -> list[Step]:
    """Every kernel call, those of branches and loops included, in program order."""
    found: list[Step] = []
    for i in body:
        match i:
            case Step():
                found.append(i)
            case Branch(then=a, otherwise=b):
                found += steps_of(a) + steps_of(b)
            case Loop(body=b):
                found += steps_of(b)
    return found
