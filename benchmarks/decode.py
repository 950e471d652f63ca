"""SmolLM2-135M, tokens per second: one token at a context of 128 (decode) and 512 tokens at once (prefill), by format.

    python -m benchmarks.decode [--threads 1 2] [--formats int4 int8 bf16 f32] [--llama-python PATH]

Decode reads every weight once, so that the bytes of the weights and of the cache, over the measured bandwidth of
memory, are the least time; the last columns say how near each engine of ours came. Contestants: vivace; onnxruntime
and OpenVINO, which get zero points of 4 bits (`int4-whole`: their kernels take no others; it is less accurate); and
llama.cpp on the same numbers as GGUF, where the Python named has llama-cpp-python (the extra `llama`).

Rules:
* TURNS: the contestants of a row take turns; each turn is a few calls after one that does not count; the median of the
  turns' medians counts. Measuring in a child process works the same.
* BITS: a row holds engines whose weights have the same bits. bf16: vivace and OpenVINO round values too.
* KEPT: what was measured replaces the rows of its format and number of threads in `benchmarks/results/decode.json`, and
  `decode.md` is written from all of them. A row says so where other processes took a tenth of a core or more meanwhile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.models import inputs, materialise, passages
from benchmarks.models.blockwise import BASE, gguf_file, materialise_blockwise
from benchmarks.models.fetch import cache_dir
from benchmarks.times import RESULTS, ROOT, versions

CONTEXT, PREFILL = 128, 512
FORMATS = ("int4", "int8", "bf16", "f32")
LLAMA = "llama.cpp"
ROUNDS = 5
TURN_SECONDS = 0.25
# Of llama.h, `llama_ftype`.
_GGUF_TYPES = {"int8": 7, "bf16": 32, "f32": 0}
_QUANTIZE = """
import sys, llama_cpp
p = llama_cpp.llama_model_quantize_default_params()
p.ftype, p.allow_requantize = int(sys.argv[3]), True
assert llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), p) == 0
"""

Call = Callable[[str], float]
Inputs = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Engine:
    """A contestant: `call` gives the seconds of one call of `decode` or `prefill`; `weight_bytes` what decode reads."""

    name: str
    call: Call
    weight_bytes: int = 0


def feeds() -> dict[str, Inputs]:
    """Inputs of both phases; the cache of `decode` holds CONTEXT - 1 tokens."""
    decode = inputs(BASE)
    prefill = inputs(BASE, "prefill-64")
    tokens = np.resize(np.array(passages.PASSAGE_SMOLLM2_TOKENS), PREFILL).astype(np.int64)[None]
    prefill |= {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    return {"decode": decode, "prefill": prefill | {"position_ids": np.arange(PREFILL, dtype=np.int64)[None]}}


def timed(run: Callable[[Inputs], object], given: dict[str, Inputs]) -> Call:
    def call(phase: str) -> float:
        x = given[phase]
        run(x)
        times: list[float] = []
        end = time.perf_counter() + TURN_SECONDS
        while time.perf_counter() < end or len(times) < 2:
            start = time.perf_counter()
            run(x)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    return call


def vivace_engine(form: str, precision: str, threads: int, given: dict[str, Inputs]) -> Engine:
    import vivace

    path = materialise(BASE) if form == "f32" else materialise_blockwise(form)
    engine = vivace.compile(path, precision=precision, threads=threads)
    weight_bytes = sum(c.nbytes for c in engine.image.constants) - _table_bytes(engine)  # type: ignore[union-attr]
    return Engine(f"vivace {precision}", timed(engine.run, given), weight_bytes)


def _table_bytes(engine: object) -> int:
    """The table of embeddings, of which one row is read."""
    return max(c.nbytes for c in engine.image.constants if c.size == 49152 * 576 and c.dtype.itemsize > 1)  # type: ignore[attr-defined]


def onnxruntime_engine(path: Path, name: str, threads: int, given: dict[str, Inputs]) -> Engine:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Engine(name, timed(lambda x: session.run(None, x), given))


def openvino_engine(path: Path, name: str, precision: str, threads: int, given: dict[str, Inputs]) -> Engine:
    import openvino as ov

    config = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": precision}
    compiled = ov.Core().compile_model(str(path), "CPU", config)
    return Engine(name, timed(lambda x: compiled(x, share_inputs=True, share_outputs=True), given))


class Llama:
    """llama.cpp in a child process, on the file of a format."""

    def __init__(self, python: str, form: str, threads: int) -> None:
        self.python = python
        script = ROOT / "benchmarks" / "llama_child.py"
        command = [python, str(script), str(self.file(form)), str(threads)]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        tokens = np.resize(np.array(passages.PASSAGE_SMOLLM2_TOKENS), PREFILL).tolist()
        self.version = self.ask(json.dumps(tokens)).split()[-1]

    def file(self, form: str) -> Path:
        source = gguf_file()
        if form == "int4":
            return source
        path = cache_dir() / f"{BASE}-{form}.gguf"
        if not path.exists():
            kind = str(_GGUF_TYPES[form])
            subprocess.run([self.python, "-c", _QUANTIZE, source, path, kind], check=True, capture_output=True)
        return path

    def ask(self, line: str) -> str:
        assert self.child.stdin is not None and self.child.stdout is not None
        self.child.stdin.write(line + "\n")
        self.child.stdin.flush()
        answer = self.child.stdout.readline()
        if not answer:
            raise RuntimeError("llama.cpp ended")
        return answer

    def call(self, phase: str) -> float:
        return float(self.ask(f"decode {CONTEXT - 1}" if phase == "decode" else f"prefill {PREFILL}"))


def engines(form: str, threads: int, given: dict[str, Inputs], llama_python: str) -> list[Engine]:
    """The contestants of a format, those that can be had here."""
    is_packed = form in ("int4", "int8")
    made: list[Callable[[], Engine]] = []
    if is_packed:
        made = [lambda p=p: vivace_engine(form, p, threads, given) for p in ("f32", "bf16")]  # type: ignore[misc]
        other = "int4-whole" if form == "int4" else "int8"
        for level in (0, 4):
            made.append(lambda n=level: onnxruntime_engine(
                materialise_blockwise(other, n), f"onnxruntime level {n}", threads, given))  # type: ignore[misc]  # fmt: skip
        made.append(lambda: openvino_engine(materialise_blockwise(other), "openvino", "f32", threads, given))
    else:
        made = [
            lambda: vivace_engine("f32", form, threads, given),
            lambda: openvino_engine(materialise(BASE), f"openvino {form}", form, threads, given),
        ]
        if form == "f32":
            made.append(lambda: onnxruntime_engine(materialise(BASE), "onnxruntime", threads, given))
    if llama_python:
        made.append(lambda: Engine(LLAMA, Llama(llama_python, form, threads).call))
    found = []
    for make in made:
        try:
            found.append(make())
        except Exception as failure:
            print(f"  left out: {type(failure).__name__}: {str(failure).splitlines()[0][:160]}", file=sys.stderr)
    return found


def measure(form: str, threads: int, llama_python: str) -> list[dict[str, object]]:
    """The rows of one format and number of threads."""
    from vivace.measure.noise import noise_since, snapshot
    from vivace.measure.peaks import machine_peaks

    given = feeds()
    contestants = engines(form, threads, given, llama_python)
    foreign: list[float] = []
    bandwidth = machine_peaks().read_bandwidth("memory", threads)
    cache_bytes = sum(v.nbytes for k, v in given["decode"].items() if k.startswith("past"))
    seconds: dict[tuple[str, str], list[float]] = {}
    for turn in range(ROUNDS):
        for e in contestants if turn % 2 else contestants[::-1]:
            for phase in ("decode", "prefill"):
                if phase == "decode" or turn < 3:
                    start = snapshot()
                    seconds.setdefault((e.name, phase), []).append(e.call(phase))
                    foreign += [noise_since(start).foreign_cores] * (e.name != LLAMA)
    rows: list[dict[str, object]] = []
    for e in contestants:
        decode, prefill = (statistics.median(seconds[e.name, phase]) for phase in ("decode", "prefill"))
        row: dict[str, object] = {"format": form, "threads": threads, "engine": e.name, "decode_tokens": 1 / decode}
        row |= {"prefill_tokens": PREFILL / prefill, "is_quiet": statistics.fmean(foreign) < 0.1}
        if e.weight_bytes:
            n_bytes = e.weight_bytes + cache_bytes
            row |= {"bytes": n_bytes, "bandwidth": n_bytes / decode, "share": n_bytes / decode / bandwidth}
        rows.append(row)
    return rows


def describe(row: dict[str, object]) -> str:
    text = f"{row['format']:5} {row['threads']} threads  {row['engine']:20} "
    text += f"{row['decode_tokens']:7.1f} {row['prefill_tokens']:8.0f}"
    if "bytes" in row:
        text += f"   {row['bytes'] / 1e6:6.1f} MB {row['bandwidth'] / 1e9:5.1f} GB/s {row['share']:5.0%}"  # type: ignore[operator]
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description="Tokens per second of a decoder.")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument(
        "--llama-python", default=sys.executable, help="a Python that has llama-cpp-python; '' for none"
    )
    options = parser.parse_args(arguments)
    print(f"tokens per second at {CONTEXT} tokens of context, and of a prefill of {PREFILL}")
    for form in options.formats:
        for threads in options.threads:
            rows = measure(form, threads, options.llama_python)
            print("\n".join(map(describe, rows)), flush=True)
            keep(form, threads, rows)
    return 0


def keep(form: str, threads: int, rows: list[dict[str, object]]) -> None:
    """Puts the rows of a format and number of threads among the results (rule KEPT)."""
    from vivace.base.machine import host
    from vivace.cli.system import machine_facts

    path = RESULTS / "decode.json"
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [r for r in before if (r["format"], r["threads"]) != (form, threads)] + rows
    rows.sort(key=lambda r: (FORMATS.index(str(r["format"])), r["threads"]))
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    found = {"machine": machine_facts(host()), "versions": versions(), "measured_at": now, "rows": rows}
    RESULTS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(found), encoding="utf-8")


def markdown(found: dict[str, Any]) -> str:
    """The table for people. Ratios are of a row's tokens to those of the best other engine of its format."""
    rows = found["rows"]
    heads = ["weights", "threads", "engine", "decode tokens/s", "of bandwidth", "over best other"]
    heads += ["prefill tokens/s", "over best other", "notes"]
    lines = ["# Decoder", "",
             f"SmolLM2-135M: one token at a context of {CONTEXT} (decode), {PREFILL} tokens at once (prefill). "
             "`python -m benchmarks.decode`; engines take turns. Above 1, vivace is faster.", "",
             f"{found['machine'].get('cpu', '?')}, {found['machine'].get('used_instruction_set', '?')}; "
             + ", ".join(f"{k} {v}" for k, v in found["versions"].items()) + f"; {found['measured_at']}.", "",
             f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]  # fmt: skip
    for r in rows:
        others = [o for o in rows if (o["format"], o["threads"]) == (r["format"], r["threads"]) and not _is_ours(o)]
        cells = [r["format"], str(r["threads"]), r["engine"]]
        for phase in ("decode_tokens", "prefill_tokens"):
            best = max((o[phase] for o in others), default=None)
            cells.append(f"{r[phase]:.1f}" if phase == "decode_tokens" else f"{r[phase]:.0f}")
            if phase == "decode_tokens":
                cells.append(f"{r['share']:.0%}" if "share" in r else "")
            cells.append(f"{r[phase] / best:.2f}" if best and _is_ours(r) else "")
        lines.append(f"| {' | '.join([*cells, '' if r['is_quiet'] else 'not quiet'])} |")
    return "\n".join([*lines, ""])


def _is_ours(row: dict[str, Any]) -> bool:
    return str(row["engine"]).startswith("vivace")


if __name__ == "__main__":
    sys.exit(main())
