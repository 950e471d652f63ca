"""The optimizer's table of contents: every pass in its order, at its level, and why it stands there.

Levels carry ONNX Runtime's names and numbers. Up to EXTENDED the graph stays portable: the exporter writes it as
standard ONNX. LAYOUT is for our own code generator.
"""

from __future__ import annotations

import difflib
import sys
from enum import IntEnum

from vivace.base.errors import InputError
from vivace.base.knobs import knobs
from vivace.graph.graph import Graph
from vivace.graph.passes import Pass, Run, remove_dead, run_passes
from vivace.optimize.layout import put_channels_last, sink_transposes
from vivace.optimize.report import Report, count_ops, moved_bytes
from vivace.optimize.rules import (
    activations,
    attention,
    causal,
    constants,
    gates,
    identities,
    indices,
    movement,
    normalization,
    quantized,
    quantized_blocks,
    quantized_scales,
    tables,
    transposes,
    weights,
)
from vivace.optimize.share import share_common


class Level(IntEnum):
    """How far to go; each level includes those before it."""

    DISABLE = 0
    BASIC = 1
    EXTENDED = 2
    LAYOUT = 3
    ALL = 99


SIMPLIFY = (*constants.RULES, *identities.RULES, *indices.RULES, *transposes.RULES, *movement.RULES)

PIPELINE: tuple[Pass, ...] = (
    Pass(
        "remove_dead", "drop what no output needs, so that nothing is spent on it", Level.BASIC,
        function=lambda g, log: remove_dead(g),
    ),
    Pass(
        "simplify", "fold constants, follow known conditions, cancel and join neighbours", Level.BASIC,
        rules=SIMPLIFY, ensures=frozenset({"simple"}),
    ),
    Pass(
        "share_common", "compute equal things once; before fusions, which want single readers", Level.BASIC,
        function=share_common,
    ),
    Pass(
        "fuse", "every spelling of activations, norms and attention as one op; weights come after", Level.EXTENDED,
        rules=(*activations.RULES, *normalization.RULES, *attention.RULES, *SIMPLIFY), requires=frozenset({"simple"}),
    ),
    Pass(
        "fold_into_weights", "scales, biases and pads into conv and matmul", Level.BASIC,
        rules=(*weights.RULES, *SIMPLIFY), requires=frozenset({"simple"}),
    ),
    Pass(
        "sink_transposes", "move transposes until they cancel, past the ops that folding left", Level.BASIC,
        function=sink_transposes, destroys=frozenset({"simple"}),
    ),
    Pass(
        "simplify_again", "join what the moves brought together", Level.BASIC,
        rules=(*SIMPLIFY, *weights.RULES), ensures=frozenset({"simple"}),
    ),
    Pass("share_again", "and share what became equal", Level.BASIC, function=share_common),
    Pass(
        "use_integers", "quantized products in integers, bytes instead of f32 between them; before constants of i8 are"
        " folded to f32", Level.LAYOUT,
        rules=(*quantized.RULES, *tables.RULES, quantized_scales.scale_once, *SIMPLIFY),
        requires=frozenset({"simple"}), ensures=frozenset({"simple"}),
    ),
    Pass(
        "pack_weights", "weights of few bits, which no integer product reads; before they are folded to f32",
        Level.LAYOUT, rules=(quantized_blocks.keep_blocks_packed,), requires=frozenset({"simple"}),
        ensures=frozenset({"simple"}),
    ),
    Pass(
        "fold_dequantized_weights", "weights that no integer product reads, as f32", Level.LAYOUT,
        rules=(quantized_blocks.fold_dequantized, *weights.RULES, *SIMPLIFY), requires=frozenset({"simple"}),
    ),
    Pass(
        "put_channels_last", "convolutions and pools on NHWC; last, since it decides for the whole graph", Level.LAYOUT,
        function=put_channels_last, requires=frozenset({"simple"}), ensures=frozenset({"channels_last"}),
    ),
    Pass(
        "finish_layout", "join what remains; constant gathers become views, causal masks a flag, products of one-hot"
        " rows gathers", Level.LAYOUT,
        rules=(
            *SIMPLIFY, *weights.RULES, *transposes.NATIVE_RULES, *movement.NATIVE_RULES, *indices.NATIVE_RULES,
            *causal.RULES, *gates.RULES,
        ),
        requires=frozenset({"channels_last"}),
    ),
    Pass(
        "sink_again", "now that convolutions are NHWC, other transposes may cancel", Level.LAYOUT,
        function=sink_transposes, requires=frozenset({"channels_last"}),
    ),
    Pass("simplify_last", "join what that brought together", Level.LAYOUT, rules=SIMPLIFY),
    Pass("share_last", "one transpose per value", Level.LAYOUT, function=share_common),
)  # fmt: skip


def rule_names() -> list[str]:
    """Every pass and every rule, the names that `disable` takes."""
    return list(dict.fromkeys([*(p.name for p in PIPELINE), *(r.name for p in PIPELINE for r in p.rules)]))


def level_of(level: int | str) -> Level:
    """A level by number or name. Raises: InputError."""
    known = {x.name.lower(): x for x in Level} | {x.value: x for x in Level}
    if level not in known:
        raise InputError(
            f"unknown level {level}",
            where="optimize",
            expected=", ".join(f"{x.name.lower()} ({x.value})" for x in Level),
        )
    return known[level]


def optimize(
    graph: Graph, level: int | str = Level.ALL, disable: tuple[str, ...] = (), report: Report | None = None
) -> Graph:
    """The graph, rewritten by every pass of `level` and below, except the passes and rules in `disable`.

    `report` is filled with counts, times and near misses; those that VIVACE_EXPLAIN asks for go to stderr.
    Raises: InputError for an unknown name or level; GraphError naming a broken pass.
    """
    level = level_of(level)
    explain = tuple(dict.fromkeys((*knobs.explain, *(report.explain if report else ()))))
    rules = list(dict.fromkeys(r.name for p in PIPELINE for r in p.rules))
    for where, names, known in (("disable", disable, rule_names()), ("explain", explain, rules)):
        if unknown := sorted(set(names) - set(known)):
            kinds = "a pass or a rule" if where == "disable" else "a rule"
            raise InputError(
                f"nothing is called {unknown[0]!r}", where=where, expected=f"{kinds} of docs/rules.md",
                hint=" or ".join(difflib.get_close_matches(unknown[0], known, cutoff=0.6)),
            )  # fmt: skip
    record = Run()
    chosen = [p for p in PIPELINE if p.level <= level]
    result = run_passes(graph, chosen, disabled=frozenset(disable), dump=knobs.dump, explain=explain, record=record)
    if knobs.explain:
        print(*record.notes, sep="\n", file=sys.stderr)
    if report is not None:
        report.stages, report.notes = record.stages, record.notes
        report.ops_before, report.ops_after = count_ops(graph), count_ops(result)
        report.bytes_before, report.bytes_after = moved_bytes(graph), moved_bytes(result)
    return result
