"""The records of `benchmarks.times` as a summary, a table, and what README.md shows of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.limits import limit_line, mean_line
from benchmarks.records import Record, write

from vivace.measure.statistics import geometric_mean

PEERS = ("onnxruntime", "openvino", "torch")
SCHEMA_VERSION = 1
_BEGIN, _END = "<!-- times: made by `python -m benchmarks.times --readme` -->", "<!-- end of times -->"


def summarise(records: Sequence[Record]) -> Record:
    """The figures of the table, from the records; times in seconds."""
    rows = [_row(record) for record in records if not record["disturbed"]]
    counts = sorted({row["threads"] for row in rows})
    means = {}
    for threads in counts:
        ratios = [row["ratio"] for row in rows if row["threads"] == threads and row["ratio"]]
        means[str(threads)] = {
            "geometric_mean": geometric_mean(ratios) if ratios else None,
            "worst": max(ratios, default=None),
            "n_models": len(ratios),
        }
    first = records[0] if records else {}
    return {
        "schema_version": SCHEMA_VERSION,
        "versions": first.get("versions", {}),
        "machine": first.get("machine", {}),
        "commits": sorted({record.get("commit", "unknown") for record in records}),
        "measured_at": max((record["measured_at"] for record in records), default=""),
        "tolerance": first.get("tolerance", {}),
        "torch": max((r.get("torch", "") for r in records if _was_timed(r, "torch")), default=""),
        "rows": rows,
        "ratio_over_best_peer": means,
        "resnet50": _resnet(records),
        "disturbed": [_disturbed(record, rows) for record in records if record["disturbed"]],
    }


def _was_timed(record: Record, name: str) -> bool:
    return any(engine["name"] == name and engine["median"] for engine in record["engines"])


def _row(record: Record) -> Record:
    engines = {engine["name"]: engine for engine in record["engines"]}
    ours = engines["vivace"]
    medians = {name: engines[name]["median"] for name in PEERS if name in engines and engines[name]["median"]}
    best = min(medians, key=medians.__getitem__) if medians else None
    is_ready = ours["median"] is not None and best is not None
    cold = {name: (engine["cold_start"] or {}).get("peak_bytes") for name, engine in engines.items()}
    return {
        "model": record["model"],
        "threads": record["threads"],
        "medians": {"vivace": ours["median"], **medians},
        "best_peer": best,
        "ratio": ours["median"] / medians[best] if is_ready and best else None,
        "ratio_interval": _interval(engines[best]) if best else None,
        "share_of_limit": ours["share_of_limit"],
        "peak_bytes": cold,
        "load_seconds": {name: (engine["cold_start"] or {}).get("load_seconds") for name, engine in engines.items()},
        "agrees": ours["agrees"],
        "overhead_seconds": record.get("overhead_seconds"),
        "is_quiet": record["noise"]["foreign_cores"] < 0.1,
        "failure": ours["failure"],
    }


def _interval(engine: Record) -> list[float] | None:
    ratio = engine["ours_over_this"]
    return [ratio["low"], ratio["high"]] if ratio and ratio["low"] is not None else None


def _resnet(records: Sequence[Record]) -> Record:
    """How near ResNet-50 is to the arithmetic peak on one thread, and what the second thread brings."""
    found = {r["threads"]: r for r in records if r["model"] == "resnet50" and not r["disturbed"]}
    medians = {n: r["engines"][0]["median"] for n, r in found.items() if r["engines"][0]["median"]}
    one = found.get(1)
    share = None
    if one and 1 in medians and one["limit"] and one["f32_peak"]:
        share = one["limit"]["flops"] / medians[1] / one["f32_peak"]
    return {"share_of_peak": share, "scaling": medians[1] / medians[2] if 1 in medians and 2 in medians else None}


def _disturbed(record: Record, rows: Sequence[Record]) -> Record:
    """Medians with one core kept busy, over the undisturbed medians on one thread."""
    quiet = next((row for row in rows if (row["model"], row["threads"]) == (record["model"], 1)), None)
    medians = {engine["name"]: engine["median"] for engine in record["engines"]}
    base = quiet["medians"] if quiet else {}
    over = {name: m / base[name] for name, m in medians.items() if m and base.get(name)}
    return {"model": record["model"], "threads": record["threads"], "medians": medians, "over_one_thread": over}


def describe(record: Record) -> str:
    """One line on a measurement."""
    if "failure" in record:
        return f"failed: {record['failure'][:200]}"
    row = _row(record)
    ms = "  ".join(f"{name} {1e3 * m:.3f} ms" for name, m in row["medians"].items() if m)
    ratio = f"{row['ratio']:.3f} of {row['best_peer']}" if row["ratio"] else f"failed: {row['failure']}"
    return f"{ms}  ratio {ratio}{'  DIFFERS' if row['agrees'] is False else ''}"


def markdown(summary: Record) -> str:
    """The whole report."""
    machine, named = summary["machine"], summary["versions"]
    lines = [
        "# Times",
        "",
        f"{machine.get('cpu', '?')}, {machine.get('cores', '?')} cores, {machine.get('used_instruction_set', '?')}; "
        + ", ".join(f"{name} {version}" for name, version in named.items())
        + f"; {summary['measured_at']}.",
        "",
        "f32, batch 1, engines interleaved in one process; median per call from Python. Below 1, vivace is faster.",
        "",
        *table(summary["rows"], is_full=True),
        "",
    ]
    for threads, mean in summary["ratio_over_best_peer"].items():
        if mean["geometric_mean"]:
            lines.append(mean_line(threads, mean))
        said = limit_line(
            (row["model"], row["medians"]["vivace"], row["share_of_limit"])
            for row in summary["rows"]
            if row["threads"] == int(threads) and row["medians"]["vivace"]
        )
        lines += [f"* {threads} thread(s): {said}"] if said else []
    resnet = summary["resnet50"]
    if resnet["share_of_peak"]:
        share = f"{resnet['share_of_peak']:.1%} of the measured f32 peak"
        lines.append(f"* ResNet-50 on 1 thread: {share}, by the operations of direct convolutions")
    if resnet["scaling"]:
        lines.append(f"* ResNet-50: 2 threads are {resnet['scaling']:.2f} times as fast as 1")
    for found in summary["disturbed"]:
        over = ", ".join(f"{name} {ratio:.2f}" for name, ratio in found["over_one_thread"].items())
        lines.append(
            f"* {found['model']} at {found['threads']} threads with one core kept busy by another process, "
            f"over its own quiet time on 1 thread: {over}"
        )
    return "\n".join([*lines, ""])


def table(rows: Sequence[Record], is_full: bool = False) -> list[str]:
    """Rows as Markdown."""
    peers = [name for name in PEERS if any(name in row["medians"] for row in rows) or name != "torch"]
    heads = ["model", "threads", "vivace ms", *(f"{name} ms" for name in peers), "ratio to best", "of limit"]
    heads += ["memory MiB (vivace; onnxruntime; openvino)", "overhead us", "notes"] if is_full else []
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in rows:
        cells = [row["model"], str(row["threads"])]
        cells += [_ms(row["medians"].get(name)) for name in ("vivace", *peers)]
        interval = row["ratio_interval"] if is_full else None
        cells.append(
            "-"
            if not row["ratio"]
            else f"{row['ratio']:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")
        )
        cells.append(f"{row['share_of_limit']:.0%}" if row["share_of_limit"] else "-")
        if is_full:
            cells.append("; ".join(_mib(row["peak_bytes"].get(name)) for name in ("vivace", "onnxruntime", "openvino")))
            cells.append(f"{row['overhead_seconds'] * 1e6:.1f}" if row["overhead_seconds"] is not None else "")
            notes = [] if row["agrees"] else ["DIFFERS"] if row["agrees"] is False else ["failed"]
            cells.append(", ".join(notes + ([] if row["is_quiet"] else ["not quiet"])))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def _mib(n_bytes: int | None) -> str:
    return "-" if not n_bytes else f"{n_bytes / (1 << 20):.0f}"


def readme_table(summary: Record) -> str:
    """What README.md shows: the table, the machine, and the means."""
    machine = summary["machine"]
    means = ", ".join(
        f"{mean['geometric_mean']:.2f} at {threads} thread{'s' if threads != '1' else ''}"
        for threads, mean in summary["ratio_over_best_peer"].items()
        if mean["geometric_mean"]
    )
    about = (
        f"{machine.get('cpu', '?')}, {machine.get('cores', '?')} cores, {machine.get('used_instruction_set', '?')}; "
        f"f32, batch 1; onnxruntime {summary['versions'].get('onnxruntime')}, "
        f"openvino {summary['versions'].get('openvino')}{_torch(summary)}; "
        f"{summary['measured_at'][:10]}. The geometric mean of our median over that of the fastest other is {means}."
    )
    return "\n".join([*table(summary["rows"]), "", about])


def _torch(summary: Record) -> str:
    """What is said of PyTorch where it was timed."""
    return f", torch {summary['torch']} compiled" if summary.get("torch") else ""


def update_readme(path: Path, summary: Record) -> None:
    """Puts the table between the two marks. Raises: SystemExit where a mark is missing."""
    text = path.read_text()
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise SystemExit(f"{path} lacks the marks {_BEGIN!r} and {_END!r}")
    write(path, f"{before}{begin}\n{readme_table(summary)}\n{end}{after}")
