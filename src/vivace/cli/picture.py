"""Graphs drawn on one self-contained page, side by side: nodes in layers from top to bottom, edges where values flow.

The drawing is plain: a node stands one row below the last of its operands, and the rows are centred. Constants are not
drawn. Hovering over a node shows its text.

Not handled: nested graphs (the node that holds them is drawn), crossings (edges may pass behind nodes).
"""

from __future__ import annotations

import html
from collections.abc import Mapping

from vivace.graph.graph import Graph, Node, Value

_BOX_WIDTH, _BOX_HEIGHT, _GAP_X, _GAP_Y = 130, 26, 16, 22
_MOST_NODES = 3000

_COLOURS = {
    "contraction": "#9ec5fe",
    "elementwise": "#d1e7dd",
    "movement": "#f1f3f5",
    "reduction": "#ffe5a0",
    "other": "#f8d7da",
}

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 14px sans-serif; margin: 1em; }} .row {{ display: flex; gap: 3em; align-items: flex-start; }}
text {{ font: 12px sans-serif; }}
</style></head><body><h1>{title}</h1><div class="row">
{graphs}
</div></body></html>
"""


def graph_page(title: str, graphs: Mapping[str, Graph]) -> str:
    """The page that shows the graphs beside each other."""
    parts = [
        f"<div><h2>{html.escape(name)}: {len(graph.nodes)} nodes</h2>{graph_svg(graph)}</div>"
        for name, graph in graphs.items()
    ]
    return _PAGE.format(title=html.escape(title), graphs="\n".join(parts))


def graph_svg(graph: Graph) -> str:
    """One graph as SVG; a text instead where it is too large to be of use."""
    if len(graph.nodes) > _MOST_NODES:
        return f"<p>more than {_MOST_NODES} nodes: not drawn</p>"
    rows = _rows(graph)
    width = max((len(row) for row in rows), default=1) * (_BOX_WIDTH + _GAP_X) + _GAP_X
    height = len(rows) * (_BOX_HEIGHT + _GAP_Y) + _GAP_Y
    place: dict[Value | Node, tuple[float, float]] = {}
    for y, row in enumerate(rows):
        start = (width - len(row) * (_BOX_WIDTH + _GAP_X)) / 2
        for x, item in enumerate(row):
            place[item] = (start + x * (_BOX_WIDTH + _GAP_X) + _GAP_X / 2, _GAP_Y + y * (_BOX_HEIGHT + _GAP_Y))
    producers = graph.producers()
    edges, boxes = [], []
    for item, at in place.items():
        sources = item.inputs if isinstance(item, Node) else ()
        for value in dict.fromkeys(v for v in sources if v is not None and v.data is None):
            edges.append(_edge(place[producers.get(value, value)], at))
        boxes.append(_box(item, at))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}">'
    return "\n".join([head, *edges, *boxes, "</svg>"])


def _rows(graph: Graph) -> list[list[Value | Node]]:
    """Inputs in the first row, each node one row below its lowest operand."""
    rows: list[list[Value | Node]] = [list(graph.inputs)]
    depth: dict[Value, int] = dict.fromkeys(graph.inputs, 0)
    for node in graph.nodes:
        row = 1 + max((depth.get(v, 0) for v in node.inputs if v is not None), default=0)
        depth |= dict.fromkeys(node.outputs, row)
        while len(rows) <= row:
            rows.append([])
        rows[row].append(node)
    return rows


def _edge(start: tuple[float, float], end: tuple[float, float]) -> str:
    x1, y1 = start[0] + _BOX_WIDTH / 2, start[1] + _BOX_HEIGHT
    x2, y2 = end[0] + _BOX_WIDTH / 2, end[1]
    return f'<line x1="{x1:.0f}" y1="{y1:.0f}" x2="{x2:.0f}" y2="{y2:.0f}" stroke="#adb5bd"/>'


def _box(item: Value | Node, at: tuple[float, float]) -> str:
    is_node = isinstance(item, Node)
    colour = _COLOURS.get(item.op.kind, _COLOURS["other"]) if is_node else "#ffffff"  # type: ignore[union-attr]
    label = item.op.name if isinstance(item, Node) else item.name
    note = str(item)
    return (
        f'<g><rect x="{at[0]:.0f}" y="{at[1]:.0f}" width="{_BOX_WIDTH}" height="{_BOX_HEIGHT}" rx="5" fill="{colour}"'
        f' stroke="#868e96"/><text x="{at[0] + _BOX_WIDTH / 2:.0f}" y="{at[1] + 17:.0f}" text-anchor="middle">'
        f"{html.escape(label[:20])}</text><title>{html.escape(note[:500])}</title></g>"
    )
