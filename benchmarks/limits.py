"""What a table says of the distance to the machine's limit, computed from its rows.

    limit_line([("resnet50", 0.056, 0.68), ...])     model, seconds of ours, share of the limit

What the limit counts is in `measure/roofline.py`. Rows without a share, and tree ensembles, whose share says nothing,
are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vivace.measure.statistics import geometric_mean

N_NAMED = 4
_SAYS_NOTHING = 0.005

Row = tuple[str, float, float | None]


def mean_line(threads: str, mean: Mapping[str, float]) -> str:
    """One sentence: our medians over the best peer's."""
    return (
        f"* {threads} thread(s): our median over the best peer's: geometric mean {mean['geometric_mean']:.3f}, "
        f"worst {mean['worst']:.3f}, over {mean['n_models']} models"
    )


def limit_line(rows: Iterable[Row]) -> str:
    """One sentence: how much faster all would be at the limit, and which rows are farthest from it."""
    known = [(name, seconds, share) for name, seconds, share in rows if share and share > _SAYS_NOTHING]
    if not known:
        return ""
    mean = geometric_mean([share for _, _, share in known])
    farthest = sorted(known, key=lambda row: row[2])[:N_NAMED]
    named = ", ".join(f"{name} {share:.0%}" for name, _, share in farthest)
    lost = sum(seconds * (1 - share) for _, seconds, share in known) / sum(seconds for _, seconds, _ in known)
    return (
        f"at the limit they would be {1 / mean:.2f} times as fast (geometric mean over {len(known)}); "
        f"{lost:.0%} of the time of all together is beyond it; farthest from it: {named}"
    )
