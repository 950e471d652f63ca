"""What convolutions and pools share: operands and results as channels-last views, [image, pixel.., channel]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vivace.base.dims import Dim
from vivace.graph.graph import Node
from vivace.lower.group import Group
from vivace.lower.lowering import Lowering
from vivace.lower.views import View


def to_last(node: Node) -> tuple[int, ...]:
    """The axes of a node's image and of its result, channels last."""
    rank = node.outputs[0].rank
    return tuple(range(rank)) if node.attrs["layout"] == "NHWC" else (0, *range(2, rank), 1)


def from_last(node: Node) -> tuple[int, ...]:
    """The axes of a channels-last view in the node's own order: the inverse of `to_last`."""
    order = to_last(node)
    return tuple(order.index(i) for i in range(len(order)))


def own_index(node: Node, index: Sequence[Dim]) -> list[Dim]:
    """An index [image, pixel.., channel] in the node's own order."""
    return [index[i] for i in from_last(node)]


def by_channel(node: Node, v: View) -> View:
    """A vector with an element per channel, its axis where the node has the channels."""
    if node.attrs["layout"] == "NHWC":
        return v
    ones = node.outputs[0].rank - 2
    return replace(v, shape=(*v.shape, *(1,) * ones), strides=(*v.strides, *(0,) * ones))


def dense_channels(ctx: Lowering, v: View, name: str) -> View:
    """A channels-last view whose channels are neighbours: a copy where they are not."""
    if v.strides[-1] == 1:
        return v
    return replace(v, strides=(*v.strides[:-1], 1)) if v.shape[-1] == 1 else ctx.contiguous(v, f"{name}_nhwc")


def dense_results(ctx: Lowering, g: Group, target: View) -> View:
    """Where to write results of which vectors of channels are stored: the channels-last `target` itself, or else a
    temporary to be copied there."""
    if target.strides[-1] == 1 or target.shape[-1] == 1:
        return target
    return ctx.temporary(f"{g.anchor.outputs[0].name}_nhwc", g.output.dtype, target.shape)
