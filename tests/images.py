"""Images of graphs as they are, for tests that need one without an engine around it."""

from __future__ import annotations

from vivace.base.machine import Isa
from vivace.building import link_image, make_plan
from vivace.graph.graph import Graph
from vivace.lower.image import Image


def build_image(graph: Graph, chosen: Isa, cache: bool, without: frozenset[str] = frozenset()) -> Image:
    """Lower, generate and link."""
    return link_image(make_plan(graph, chosen, ("native",), without), chosen, cache, None)
