"""`vivace inspect --threads 4,8,...`: how a model's work would be shared out on more cores than this machine has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vivace.base.errors import InputError
from vivace.cli import options

if TYPE_CHECKING:
    from vivace.measure.scaling import Scaling


def thread_counts(text: str) -> tuple[int, ...]:
    """`4,8,16`. Raises: InputError for what is no list of counts."""
    try:
        counts = tuple(int(word) for word in options.split(text))
    except ValueError:
        counts = (0,)
    if any(n < 1 for n in counts):
        raise InputError(f"cannot read {text!r}", where="--threads", expected="counts with commas, such as 4,8,16")
    return counts


def scaling_of(model: Path, shapes: Sequence[str], counts: tuple[int, ...], progress: Any = None) -> Scaling:
    """Compiles the model for one thread, times its steps on generated inputs, and predicts.

    Raises: InputError for a model that our kernels do not run.
    """
    import vivace
    from vivace.cli.options import is_saved
    from vivace.measure.scaling import examine
    from vivace.runtime.engine import Engine

    engine = vivace.load(model, threads=1) if is_saved(model) else vivace.compile(model, threads=1, progress=progress)
    if not isinstance(engine, Engine):
        raise InputError("another engine runs this model", where=str(model), expected="a model with native kernels")
    arrays, _ = options.gather(engine.inputs, options.shapes_of(shapes), (), 0)
    return examine(engine, arrays, counts)


def print_scaling(found: Scaling) -> None:
    """The table for people."""
    from vivace.cli.console import duration, print_table
    from vivace.targets.cpu.team import MAX_THREADS

    print(
        f"{'steps':10} {found.n_stages} stages: {found.n_barriers} shared out, {found.n_serial} too small; "
        f"{found.serial_share:.1%} of the work is on one thread"
    )
    costs = found.costs
    print(
        f"{'hand-over':10} seen after {costs.see_ns:.0f} ns, a claim {costs.claim_ns:.0f} ns, "
        f"a step alone {costs.step_ns:.0f} ns"
    )
    few = dict(found.least_grains)
    rows = [
        [
            str(p.threads), duration(p.seconds), f"{p.speed_up:.1f}", f"{p.efficiency:.0%}", f"{p.unshared:.0%}",
            f"{p.handing_over:.0%}", f"{few[p.threads]:.0%}",
        ]
        for p in found.predictions
    ]  # fmt: skip
    columns = ["threads", "time", "times faster", "efficiency", "no piece", "handing over", "work in few pieces"]
    print_table("predicted, from steps timed on one thread; shared caches and memory not counted", columns, rows)
    if found.stays_on_one:
        print("so little work stays on one thread, whatever is asked for")
    if any(p.threads > MAX_THREADS for p in found.predictions):
        print(f"an engine uses at most {MAX_THREADS} threads today")
