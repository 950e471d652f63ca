"""Windows over images: convolutions, pools, resizes, pads. Each function draws one operator and gives its results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tests.networks.draw import Draw


def conv(d: Draw) -> Sequence[str]:
    rank, group = d.pick(1, 2, 2, 2, 3), d.pick(1, 1, 2, 3)
    c, n = group * d.size(1, 4), group * d.size(1, 5)
    kernel, strides = d.shape(rank, 1, 4), [d.pick(1, 1, 2, 3) for _ in range(rank)]
    dilations: list[int] | None = [d.pick(1, 1, 2, 3) for _ in range(rank)]
    how = d.pick("NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID")
    assert dilations is not None
    sizes = [d.size((k - 1) * e + 1, 12) for k, e in zip(kernel, dilations, strict=True)]
    w = d.either(d.normal(n, c // group, *kernel))
    return [
        d.op(
            "Conv", d.x(d.size(1, 3), c, *sizes), w, d.weight(n) if d.flip() else "", auto_pad=how, group=group,
            pads=d.shape(2 * rank, 0, 3) if how == "NOTSET" else None, strides=strides if d.flip(0.8) else None,
            dilations=None if how.startswith("SAME") else dilations, kernel_shape=kernel if d.flip(0.7) else None,
        )
    ]  # fmt: skip


def conv_transpose(d: Draw) -> Sequence[str]:
    rank, group = d.pick(1, 2, 2, 3), d.pick(1, 1, 2)
    c, n, kernel = group * d.size(1, 4), d.size(1, 4), d.shape(rank, 1, 4)
    strides, dilations = d.shape(rank, 1, 3), [d.pick(1, 1, 2) for _ in range(rank)]
    sizes = d.shape(rank, 1, 6)
    reach = [(k - 1) * e for k, e in zip(kernel, dilations, strict=True)]
    more: dict[str, Any] = {}
    match d.pick("pads", "pads", "shape", "same"):
        case "pads":
            more["pads"] = [d.size(0, r // 2) for r in reach] * 2
            more["output_padding"] = [d.size(0, s - 1) for s in strides] if d.flip() else None
        case "shape":
            whole = [(n - 1) * s + r + 1 for n, s, r in zip(sizes, strides, reach, strict=True)]
            more["output_shape"] = [n - d.size(0, min(1, r)) for n, r in zip(whole, reach, strict=True)]
        case _:  # beyond the reach of a kernel ONNX Runtime gives fewer results than ONNX says
            strides = tuple(min(s, r + 1) for s, r in zip(strides, reach, strict=True))
            more["auto_pad"] = d.pick("SAME_UPPER", "SAME_LOWER", "VALID")
    w = d.either(d.normal(c, n, *kernel))
    bias = d.weight(n * group) if d.flip() else ""
    x = d.x(d.size(1, 2), c, *sizes)
    return [d.op("ConvTranspose", x, w, bias, strides=strides, dilations=dilations, group=group, **more)]


def pool(d: Draw) -> Sequence[str]:
    rank, op = d.pick(1, 2, 2, 3), d.pick("MaxPool", "AveragePool", "LpPool", "MaxPool")
    kernel, strides = d.shape(rank, 1, 4), d.shape(rank, 1, 3)
    how = d.pick("NOTSET", "NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID")
    takes = how == "NOTSET" and (op == "MaxPool" or (op == "AveragePool" and d.opset >= 19))
    dilations = [d.pick(1, 1, 2) for _ in range(rank)] if takes else None
    sizes = [d.size((k - 1) * e + 1, 11) for k, e in zip(kernel, dilations or (1,) * rank, strict=True)]
    more: dict[str, Any] = {}
    if op == "LpPool":
        more["p"] = d.size(1, 3)
    elif how == "NOTSET":
        more["ceil_mode"] = d.pick(0, 1)
    if op == "AveragePool":
        more["count_include_pad"] = d.pick(0, 1)
    pads = [d.size(0, k - 1) for k in kernel * 2] if how == "NOTSET" else None
    x = d.x(d.size(1, 2), d.size(1, 5), *sizes)
    n = 2 if op == "MaxPool" and d.flip(0.3) else 1
    return d.results(
        op, x, n=n, kernel_shape=kernel, strides=strides, pads=pads, auto_pad=how, dilations=dilations, **more
    )


def resize(d: Draw) -> Sequence[str]:
    mode, rank = d.pick("nearest", "nearest", "linear", "linear", "cubic"), d.pick(1, 2, 2)
    how = d.pick("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel", "half_pixel_symmetric")
    if how == "half_pixel_symmetric" and d.opset < 19:
        how = "half_pixel"
    more: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": how}
    sizes = d.shape(2, 2, 8) if mode == "cubic" else d.shape(rank, 1, 8)  # the peer has no cubic of one axis
    if mode == "nearest":
        more["nearest_mode"] = d.pick("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
    elif d.opset >= 18 and how != "align_corners" and d.flip(0.3):
        more["antialias"] = 1
    if mode == "cubic":
        more |= {"cubic_coeff_a": d.pick(-0.5, -0.75), "exclude_outside": d.pick(0, 1)}
    lead = d.shape(2, 1, 3)
    x = d.x(*lead, *sizes)
    if d.flip():
        scales = [d.pick(0.5, 1, 1.5, 2, 3, 0.75, 2.6) for _ in sizes]
        if any(int(n * s) < 1 for n, s in zip(sizes, scales, strict=True)):
            scales = [2.0 for _ in sizes]
        return [d.op("Resize", x, "", d.const([1, 1, *scales], np.float32), **more)]
    return [d.op("Resize", x, "", "", d.ints(*lead, *d.shape(len(sizes), 1, 12)), **more)]


def pad(d: Draw) -> Sequence[str]:
    shape = d.shape(d.size(1, 4), 2, 6)
    mode = d.pick("constant", "constant", "reflect", "edge", "wrap" if d.opset >= 19 else "edge")
    pads = np.array([d.size(-1 if mode == "constant" else 0, min(3, n - 1)) for n in shape * 2], np.int64)
    value = d.const(np.float32(1.5)) if d.flip() else ""
    return [d.op("Pad", d.x(*shape), d.either(pads) if d.flip(0.3) else d.const(pads), value, mode=mode)]


FAMILIES = (conv, conv_transpose, pool, resize, pad)
