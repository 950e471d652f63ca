"""`python -m vivace.cli.child JOB.json`: loads one engine in a fresh process, runs it, and prints what that took.

The job names the provider, the model, its shapes, threads and a .npz file of inputs; see `cold_command`. Nothing that
the engine itself does not need is imported.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any


def cold_command(folder: Path, provider: str, job: Any, arrays: Any) -> list[str]:
    """Writes the files of a job into a folder, and gives the command that does it."""
    import numpy as np

    inputs = folder / "inputs.npz"
    if not inputs.exists():
        np.savez(inputs, allow_pickle=False, **{f"input{i}": a for i, a in enumerate(arrays.values())})
    record = {
        "provider": provider,
        "job": {**asdict(job), "model": str(job.model), "shapes": {k: list(v) for k, v in job.shapes.items()}},
        "inputs": str(inputs),
        "names": list(arrays),
    }
    path = folder / f"{provider.replace(',', '-')}.json"
    path.write_text(json.dumps(record))
    return [sys.executable, "-m", "vivace.cli.child", str(path)]


def main(path: str) -> None:
    """Does the job and prints a ColdStart."""
    import numpy as np

    from vivace.cli.contestants import Job, open_engine
    from vivace.measure.memory import ColdStart, peak_bytes

    record = json.loads(Path(path).read_text())
    fields = {**record["job"], "model": Path(record["job"]["model"]), "disable": tuple(record["job"]["disable"])}
    fields["shapes"] = {name: tuple(shape) for name, shape in fields["shapes"].items()}
    with np.load(record["inputs"], allow_pickle=False) as archive:
        arrays = {name: archive[f"input{i}"] for i, name in enumerate(record["names"])}
    base_bytes = peak_bytes()
    start = time.perf_counter()
    _import(record["provider"])
    imported = time.perf_counter()
    engine = open_engine(record["provider"], Job(**fields))
    loaded = time.perf_counter()
    engine.run(arrays)
    first = time.perf_counter()
    for _ in range(3):
        engine.run(arrays)
    found = ColdStart(imported - start, loaded - imported, first - loaded, peak_bytes(), base_bytes)
    print(json.dumps(asdict(found)))


def _import(provider: str) -> None:
    from vivace.cli.options import is_native

    if is_native(provider):
        import vivace.compiler
        import vivace.runtime.engine  # noqa: F401
    else:
        from vivace.providers.provider import find

        find(provider)


if __name__ == "__main__":
    main(sys.argv[1])
