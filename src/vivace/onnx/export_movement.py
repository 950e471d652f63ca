"""Writing ops that move data: reshape and its kin, slices (and Split), pads, gathers, scatters, resize."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vivace.base.dims import Dim, Expr
from vivace.base.dtypes import DType
from vivace.graph.graph import Graph, Node, Value
from vivace.onnx.tensors import data_type_of
from vivace.onnx.writer import END, Writer

Write = Callable[[Writer, Node, list[str]], None]


def reshape(w: Writer, x: str, old: Sequence[Dim], new: Sequence[Dim], out: str) -> str:
    """Reshape with a constant shape where `0` (keep) and one `-1` can say it, else Unsqueeze or Squeeze, else computed
    dims."""
    said: list[int] = []
    unknown = 0
    for i, d in enumerate(new):
        if i < len(old) and d == old[i] and isinstance(d, Expr):
            said.append(0)
        elif isinstance(d, int) and d:
            said.append(d)
        else:
            said.append(-1)
            unknown += 1
    if unknown <= 1 and 0 not in new:
        return w.emit("Reshape", [x, w.const(said, "shape")], out)
    for op, longer, shorter in (("Unsqueeze", new, old), ("Squeeze", old, new)):
        axes = _ones(longer, shorter)
        if axes is not None:
            return w.emit(op, [x, w.const(axes, "axes")], out)
    return w.emit("Reshape", [x, w.shape(new)], out, allowzero=1)


def _ones(longer: Sequence[Dim], shorter: Sequence[Dim]) -> list[int] | None:
    """The axes of extent 1 without which `longer` is `shorter`."""
    axes: list[int] = []
    rest = list(shorter)
    for i, d in enumerate(longer):
        if rest and rest[0] == d and (d != 1 or len(longer) - i == len(rest)):
            rest.pop(0)
        elif d == 1 and len(longer) - len(axes) > len(shorter):
            axes.append(i)
        elif rest and rest[0] == d:
            rest.pop(0)
        else:
            return None
    return axes if axes and not rest else None


def _reshape(w: Writer, n: Node, outs: list[str]) -> None:
    x = n.inputs[0]
    assert x is not None
    if x.type == n.output.type:
        w.emit("Identity", [w.ref(x)], outs)
    else:
        reshape(w, w.ref(x), x.shape, n.output.shape, outs[0])


def _transpose(w: Writer, n: Node, outs: list[str]) -> None:
    w.emit("Transpose", [w.ref(n.inputs[0])], outs, perm=list(n.attrs["perm"]))


def _expand(w: Writer, n: Node, outs: list[str]) -> None:
    x = n.inputs[0]
    assert x is not None
    lead = n.output.rank - x.rank
    # Expand broadcasts both ways, so 1 keeps a dim.
    said = [1 if i >= lead and d == x.shape[i - lead] else d for i, d in enumerate(n.output.shape)]
    w.emit("Expand", [w.ref(x), w.shape(said)], outs)


def _slice(w: Writer, n: Node, outs: list[str]) -> None:
    x, a = n.inputs[0], n.attrs
    assert x is not None
    starts: list[Dim] = []
    ends: list[Dim] = []
    axes: list[int] = []
    steps: list[int] = []
    for i, (d, start, size, step) in enumerate(zip(x.shape, a["starts"], a["sizes"], a["steps"])):
        if start == 0 and size == d and step == 1:
            continue
        end, back = start + size * step, start - d
        left = end - d
        if isinstance(left, int) and step > 0:
            end = END if left >= 0 else left if isinstance(end, Expr) else end  # counted from the end
        elif isinstance(end, int) and step < 0 and end < 0:
            end = -END
        if isinstance(start, Expr) and isinstance(back, int) and back < 0:
            start = back
        axes.append(i)
        starts.append(start)
        ends.append(end)
        steps.append(step)
    args = [w.ref(x), w.shape(starts), w.shape(ends), w.const(axes, "axes")]
    if any(s != 1 for s in steps):
        args.append(w.const(steps, "steps"))
    w.emit("Slice", args, outs)


def find_splits(w: Writer, graph: Graph) -> None:
    """Slices that together divide a tensor along one axis are noted as one Split."""
    pieces: dict[tuple[Value, int], list[Node]] = {}
    for n in graph.nodes:
        axis = _cut_axis(n)
        if axis is not None and n.inputs[0] is not None:
            pieces.setdefault((n.inputs[0], axis), []).append(n)
    for (x, axis), parts in pieces.items():
        parts = sorted(parts, key=lambda m: m.attrs["starts"][axis])
        ends = [m.attrs["starts"][axis] + m.attrs["sizes"][axis] for m in parts]
        if len(parts) > 1 and [0, *ends] == [*(m.attrs["starts"][axis] for m in parts), x.shape[axis]]:
            for m in parts:
                w.splits[m] = (axis, parts)


def _cut_axis(n: Node) -> int | None:
    """The axis along which a slice takes a fixed piece, if it leaves all others whole."""
    x = n.inputs[0] if n.inputs else None
    if n.op.name != "slice" or x is None or x.data is not None:
        return None
    a = n.attrs
    cut = [i for i in range(x.rank) if (a["starts"][i], a["sizes"][i], a["steps"][i]) != (0, x.shape[i], 1)]
    if len(cut) != 1 or a["steps"][cut[0]] != 1:
        return None
    fixed = all(isinstance(d, int) for d in (a["starts"][cut[0]], a["sizes"][cut[0]], x.shape[cut[0]]))
    return cut[0] if fixed else None


def _slice_or_split(w: Writer, n: Node, outs: list[str]) -> None:
    if n not in w.splits:
        _slice(w, n, outs)
        return
    axis, parts = w.splits[n]
    names = [outs[0] if m is n else w.final.get(m.output) or w.fresh(m.output.name) for m in parts]
    sizes = [m.attrs["sizes"][axis] for m in parts]
    w.emit("Split", [w.ref(n.inputs[0]), w.const(sizes, "split")], names, axis=axis)
    for m, name in zip(parts, names):
        w.define(m.output, name)
        w.done.add(m)


def _pad(w: Writer, n: Node, outs: list[str]) -> None:
    x, a = n.inputs[0], n.attrs
    assert x is not None
    args = [w.ref(x), w.shape([*a["before"], *a["after"]])]
    if a["mode"] == "constant":
        args.append(w.const(np.asarray(a["value"], x.dtype.numpy), "value"))
    w.emit("Pad", args, outs, mode=a["mode"])


def _concat(w: Writer, n: Node, outs: list[str]) -> None:
    w.emit("Concat", [w.ref(v) for v in n.inputs], outs, axis=n.attrs["axis"])


def _iota(w: Writer, n: Node, outs: list[str]) -> None:
    shape, axis, dtype = n.attrs["shape"], n.attrs["axis"], n.attrs["dtype"]
    whole = len(shape) == 1
    end = (
        w.emit("Squeeze", [w.dim(shape[axis])])
        if isinstance(shape[axis], Expr)
        else w.const(np.int64(shape[axis]), "end")
    )
    line = w.emit(
        "Range", [w.const(np.int64(0)), end, w.const(np.int64(1))], outs if whole and dtype is DType.i64 else ""
    )
    if dtype is not DType.i64:
        line = w.emit("Cast", [line], outs if whole else "", to=data_type_of(dtype))
    if not whole:
        column = [-1 if i == axis else 1 for i in range(len(shape))]
        line = w.emit("Reshape", [line, w.const(column, "shape")])
        w.emit("Expand", [line, w.shape([1 if i == axis else d for i, d in enumerate(shape)])], outs)


def _dims(w: Writer, n: Node, outs: list[str]) -> None:
    values = n.attrs["values"]
    name = w.shape(values)
    w.names[n.output] = name
    if n.output in w.outputs:
        del w.names[n.output]
        w.emit("Identity", [name], outs)


def _gather(w: Writer, n: Node, outs: list[str]) -> None:
    op = {"gather": "Gather", "gather_elements": "GatherElements", "gather_nd": "GatherND"}[n.op.name]
    w.emit(op, [w.ref(v) for v in n.inputs], outs, **dict(n.attrs))


def _scatter(w: Writer, n: Node, outs: list[str]) -> None:
    op = {"scatter_elements": "ScatterElements", "scatter_nd": "ScatterND"}[n.op.name]
    w.emit(op, [w.ref(v) for v in n.inputs], outs, **dict(n.attrs))


def _topk(w: Writer, n: Node, outs: list[str]) -> None:
    a = n.attrs
    w.emit(
        "TopK",
        [w.ref(n.inputs[0]), w.dim(a["k"])],
        outs,
        axis=a["axis"],
        largest=int(a["largest"]),
        sorted=int(a["sorted"]),
    )


def _resize(w: Writer, n: Node, outs: list[str]) -> None:
    x, a = n.inputs[0], n.attrs
    assert x is not None
    scales = [1.0 if s is None and d == e else s for s, d, e in zip(a["scales"], x.shape, a["sizes"])]
    args = [w.ref(x), ""]
    if all(s is not None for s in scales):
        args.append(w.const(np.asarray(scales, np.float32), "scales"))
    else:
        args += ["", w.shape(a["sizes"])]
    more = {}
    if a["mode"] == "cubic":
        more = {"cubic_coeff_a": a["cubic_coeff"], "exclude_outside": int(a["exclude_outside"])}
    elif a["mode"] == "nearest":
        more = {"nearest_mode": a["nearest_mode"]}
    elif a["exclude_outside"]:
        more = {"exclude_outside": 1}
    w.emit("Resize", args, outs, mode=a["mode"], coordinate_transformation_mode=a["coordinate"], **more)


WRITERS: dict[str, Write] = {
    "reshape": _reshape,
    "transpose": _transpose,
    "expand": _expand,
    "slice": _slice_or_split,
    "pad": _pad,
    "concat": _concat,
    "iota": _iota,
    "dims": _dims,
    "gather": _gather,
    "gather_elements": _gather,
    "gather_nd": _gather,
    "scatter_elements": _scatter,
    "scatter_nd": _scatter,
    "topk": _topk,
    "resize": _resize,
}
