"""SmolLM2-135M, tokens per second: one token at a context of 128 (decode) and of 1024 (long), and 512 tokens at once
(prefill), by format.

    python -m benchmarks.decode [--threads 1 2] [--formats int4 int8 bf16 f32] [--phases decode long prefill]
                                [--llama-python PATH]

Decode reads every weight once, reads the cache and writes it anew, longer by a token, as the file asks. So the bytes of
the weights and twice those of the cache are the least that memory has to deal with; "of bandwidth" is how fast an
engine of ours did that against a bare loop, in turns with it, that reads as many bytes from one array (rule BARE).
Where the cache lies in place (rule IN PLACE), it is only read.

Contestants: vivace; onnxruntime and OpenVINO, which get zero points of 4 bits (`int4-whole`: their kernels take no
others; it is less accurate); and llama.cpp, where the Python named has llama-cpp-python (the extra `llama`): with the
same numbers as GGUF, and for int4 with Q4_0 too, which is less accurate and for which it has kernels of its own.
llama.cpp keeps its cache in place; OpenVINO and onnxruntime write it anew.

llama-cpp-python is compiled while it is installed. Where its kernels for AMX end with an illegal instruction (0.3.36 on
Emerald Rapids), leave them out:

    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DGGML_AVX512=ON
                -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON"
    pip install --no-binary llama-cpp-python llama-cpp-python

Rules:
* TURNS: the contestants of a row take turns, which begin when all threads are idle; a call that does not count goes
  before the first turn, and before each turn of several calls; a call longer than a turn is one. The median of the
  turns' medians counts. Measuring in a child process works the same.
* BARE: the loop is that of `vivace sys`, which shows it for more bytes than the last level holds. What it reaches here
  has the caches' help as the engines have it, and the machine's mood.
* BEYOND: "of memory" is the same share of a bare loop over four times the last level, which only memory serves: where
  weights lie in a large last level, it exceeds 1.
* IN PLACE: the same engine of ours, with caches in arrays with room for more (`docs/guide.md`). Its calls are those of
  a loop that generates text: each is for a token more than the last, over `GROWTH` tokens, takes the views that the
  last gave, and makes longer ones. Calls of the other engines repeat one shape.
* STEPS: where the time of a token goes, by kind of step (`decode_steps`), is measured after the turns, for engines with
  their caches in place.
* LEVELS: level 4 of onnxruntime and of ours is the same model with `accuracy_level` 4 on each product: its rows may
  be rounded to bytes with a scale for each block. llama.cpp always does. Without, ours have the error of f32 (or of
  bf16), as have level 0 and OpenVINO.
* BITS: a row holds engines whose weights have the same bits. bf16: vivace and OpenVINO round values too.
* KEPT: what was measured replaces the same phase of its format and number of threads in
  `benchmarks/results/decode.json`, and `decode.md` is written from all of them, so that a long measurement can be done
  in parts. A row says so where other processes took a tenth of a core or more meanwhile.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks import block_products
from benchmarks.block_products import BLOCK, COLUMNS
from benchmarks.decode_steps import kinds_of_steps, table
from benchmarks.models import inputs, materialise, passages
from benchmarks.models.blockwise import BASE, gguf_file, materialise_blockwise
from benchmarks.models.fetch import cache_dir
from benchmarks.records import RESULTS, ROOT, versions

CONTEXTS, PREFILL = {"decode": 128, "long": 1024}, 512
GROWTH = 16
PHASES = (*CONTEXTS, "prefill")
FORMATS = ("int4", "int8", "bf16", "f32")
LLAMA = "llama.cpp"
ROUNDS = {"decode": 5, "long": 5, "prefill": 3}
TURN_SECONDS = 0.25
_BEYOND = 4  # times the last level of caches: rule BEYOND
_REPEATS = 8  # of the bare loop, beside which the start of a thread counts for nothing
# Of llama.h, `llama_ftype`.
_GGUF_TYPES = {"int4": {"": None, " Q4_0": 2}, "int8": {"": 7}, "bf16": {"": 32}, "f32": {"": 0}}
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
    """A contestant: `call` gives the seconds of one call of a phase of `phases`; `weight_bytes` what decode reads, and
    how many times it reads or writes the cache."""

    name: str
    call: Call
    weight_bytes: int = 0
    cache_passes: int = 2
    phases: tuple[str, ...] = PHASES
    steps: Callable[[str, Call, int], list[dict[str, Any]]] | None = None

    def decode_bytes(self, phase: str) -> int:
        return self.weight_bytes + self.cache_passes * _cache_bytes(phase)


def feeds() -> dict[str, Inputs]:
    """Inputs of all phases; the cache of a decoding one holds all tokens of its context but one."""
    given = {phase: _decoding(n) for phase, n in CONTEXTS.items()}
    prefill = inputs(BASE, "prefill-64")
    tokens = np.resize(np.array(passages.PASSAGE_SMOLLM2_TOKENS), PREFILL).astype(np.int64)[None]
    prefill |= {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    return given | {"prefill": prefill | {"position_ids": np.arange(PREFILL, dtype=np.int64)[None]}}


def _decoding(context: int) -> Inputs:
    """One token after a cache, which is that of the model's sample, repeated."""
    found = inputs(BASE)
    for name, cache in found.items():
        if _is_cache(name):
            found[name] = np.ascontiguousarray(cache[:, :, np.arange(context - 1) % cache.shape[2]])
    found["attention_mask"] = np.ones((1, context), np.int64)
    return found | {"position_ids": np.array([[context - 1]], np.int64)}


def _is_cache(name: str) -> bool:
    return name.startswith("past")


def _cache_bytes(phase: str) -> int:
    per_token = sum(v.nbytes // v.shape[2] for k, v in inputs(BASE).items() if _is_cache(k))
    return per_token * (CONTEXTS[phase] - 1)


def timed(run: Callable[[Any], object], given: Mapping[str, Any]) -> Call:
    ready: set[str] = set()

    def call(phase: str) -> float:
        x, start = given[phase], time.perf_counter()
        run(x)
        first = time.perf_counter() - start
        if phase in ready and first > TURN_SECONDS:
            return first
        ready.add(phase)
        times: list[float] = []
        end = time.perf_counter() + TURN_SECONDS
        while time.perf_counter() < end or not times:
            start = time.perf_counter()
            run(x)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    return call


def vivace_engines(form: str, precision: str, threads: int, given: dict[str, Inputs], level: int = 0) -> list[Engine]:
    """One engine, called as the others are, and with its caches in place; `level`: rule LEVELS."""
    import vivace

    path = materialise_blockwise(form, level) if form in ("int4", "int8") else materialise(BASE)
    engine = vivace.compile(path, precision=precision, threads=threads)
    weight_bytes = sum(c.nbytes for c in engine.image.constants) - _table_bytes(engine)  # type: ignore[union-attr]
    name = f"vivace {precision}" + (f" level {level}" if level else "")
    loops = {phase: text_loop(engine, given[phase], n) for phase, n in CONTEXTS.items()}

    def steps(phase: str, bare: Call, n_bytes: int) -> list[dict[str, Any]]:
        return kinds_of_steps(engine, loops[phase], lambda: bare("decode"), n_bytes)

    return [
        Engine(name, timed(engine.run, given), weight_bytes),
        Engine(f"{name} in place", timed(lambda x: engine.run(*x()), loops), weight_bytes, 1, tuple(CONTEXTS), steps),
    ]


def text_loop(engine: Any, given: Inputs, context: int) -> Callable[[], tuple[Inputs, Inputs]]:
    """What calls get and fill, for one token more each time, around a context, with caches in place (rule IN PLACE)."""
    longest, appended = context + GROWTH // 2, engine.appended
    lengths = range(longest - GROWTH, longest)
    caches = {}
    for present, past in appended.items():
        cache = given[past]
        caches[present] = np.zeros((*cache.shape[:2], longest, *cache.shape[3:]), cache.dtype)
        caches[present][:, :, : cache.shape[2]] = cache

    def tokens() -> Iterator[tuple[Inputs, Inputs]]:
        inputs = {appended[y]: cache[:, :, : lengths[0]] for y, cache in caches.items()}
        for n in lengths:
            token = {"input_ids": given["input_ids"], "attention_mask": np.ones((1, n + 1), np.int64),
                     "position_ids": np.array([[n]], np.int64)}  # fmt: skip
            outputs = {y: cache[:, :, : n + 1] for y, cache in caches.items()}
            yield inputs | token, outputs
            inputs = {appended[y]: present for y, present in outputs.items()}

    calls = itertools.chain.from_iterable(iter(tokens, None))
    return lambda: next(calls)


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


def bare_reading(n_bytes: int, threads: int) -> Call:
    """Seconds that so many bytes take to be read, each thread its part (rule BARE)."""
    from vivace.targets.cpu.amx import host_isa
    from vivace.targets.cpu.peaks import peak_kernels

    read, part = peak_kernels(host_isa()).read, n_bytes // threads // 4096 * 4096
    arrays = [np.ones(part + 4096, np.uint8) for _ in range(threads)]
    places = [-(-a.ctypes.data // 4096) * 4096 for a in arrays]

    def run(_: object) -> None:
        others = [threading.Thread(target=read, args=(at, _REPEATS, part)) for at in places[1:]]
        for other in others:
            other.start()
        read(places[0], _REPEATS, part)
        for other in others:
            other.join()

    timer = timed(run, {"decode": {}})
    return lambda phase, arrays=arrays: timer(phase) / _REPEATS  # type: ignore[misc]


class Llama:
    """llama.cpp in a child process, on the file of a format."""

    def __init__(self, python: str, form: str, threads: int, ftype: int | None) -> None:
        self.python = python
        script = ROOT / "benchmarks" / "llama_child.py"
        command = [python, str(script), str(self.file(form, ftype)), str(threads)]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        tokens = np.resize(np.array(passages.PASSAGE_SMOLLM2_TOKENS), max(CONTEXTS.values())).tolist()
        self.version = self.ask(json.dumps(tokens)).split()[-1]

    def file(self, form: str, ftype: int | None) -> Path:
        source = gguf_file()
        if ftype is None:
            return source
        path = cache_dir() / f"{BASE}-{form}.gguf"
        if not path.exists():
            command = [self.python, "-c", _QUANTIZE, str(source), str(path), str(ftype)]
            subprocess.run(command, check=True, capture_output=True)
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
        return float(self.ask(f"decode {CONTEXTS[phase] - 1}" if phase in CONTEXTS else f"prefill {PREFILL}"))


def engines(form: str, threads: int, given: dict[str, Inputs], llama_python: str) -> list[Engine]:
    """The contestants of a format, those that can be had here."""
    is_packed = form in ("int4", "int8")
    ours = ("f32", "bf16") if is_packed else (form,)
    made: list[Callable[[], Engine | list[Engine]]]
    made = [lambda p=p: vivace_engines(form, p, threads, given) for p in ours]  # type: ignore[misc]
    if is_packed:
        made.append(lambda: vivace_engines(form, "f32", threads, given, 4))
        other = "int4-whole" if form == "int4" else "int8"
        for level in (0, 4):
            made.append(lambda n=level: onnxruntime_engine(
                materialise_blockwise(other, n), f"onnxruntime level {n}", threads, given))  # type: ignore[misc]  # fmt: skip
        made.append(lambda: openvino_engine(materialise_blockwise(other), "openvino", "f32", threads, given))
    else:
        made.append(lambda: openvino_engine(materialise(BASE), f"openvino {form}", form, threads, given))
        if form == "f32":
            made.append(lambda: onnxruntime_engine(materialise(BASE), "onnxruntime", threads, given))
    for kind, ftype in _GGUF_TYPES[form].items() if llama_python else ():
        made.append(lambda k=kind, f=ftype: Engine(LLAMA + k, Llama(llama_python, form, threads, f).call))  # type: ignore[misc]
    found: list[Engine] = []
    for make in made:
        try:
            several = make()
            found += several if isinstance(several, list) else [several]
        except Exception as failure:
            print(f"  left out: {type(failure).__name__}: {str(failure).splitlines()[0][:160]}", file=sys.stderr)
    return found


def measure(form: str, threads: int, phases: Sequence[str], llama_python: str) -> list[dict[str, Any]]:
    """The rows of one format and number of threads."""
    from vivace.base.machine import host
    from vivace.measure.bench import wait_until_idle
    from vivace.measure.noise import noise_since, snapshot

    given = feeds()
    contestants = engines(form, threads, given, llama_python)
    foreign: dict[str, list[float]] = {phase: [] for phase in phases}
    ours = [e for e in contestants if e.weight_bytes]
    sizes = {p: {e.decode_bytes(p) for e in ours} for p in phases if p in CONTEXTS}
    bare = {n: bare_reading(n, threads) for n in set().union(*sizes.values())}
    read: dict[int, list[float]] = {n: [] for n in bare}
    beyond = _BEYOND * host().cache_bytes(3)
    memory, from_memory = bare_reading(beyond, threads), {phase: list[float]() for phase in phases}
    seconds: dict[tuple[str, str], list[float]] = {}
    for phase in phases:
        for turn in range(ROUNDS[phase]):
            for e in contestants if turn % 2 else contestants[::-1]:
                if phase not in e.phases:
                    continue
                wait_until_idle()
                start = snapshot()
                seconds.setdefault((e.name, phase), []).append(e.call(phase))
                foreign[phase] += [noise_since(start).foreign_cores] * (not e.name.startswith(LLAMA))
            wait_until_idle()
            for n in sizes.get(phase, ()):
                read[n].append(bare[n]("decode"))
            if phase in sizes:
                from_memory[phase].append(memory("decode") / beyond)
    rows: list[dict[str, Any]] = []
    for e in contestants:
        row: dict[str, Any] = {"format": form, "threads": threads, "engine": e.name}
        for phase in (p for p in phases if p in e.phases):
            taken = statistics.median(seconds[e.name, phase])
            tokens = PREFILL if phase == "prefill" else 1
            row[phase] = {"tokens": tokens / taken, "is_quiet": statistics.fmean(foreign[phase]) < 0.1}
            if phase in CONTEXTS and e.weight_bytes:
                n_bytes = e.decode_bytes(phase)
                row[phase] |= {"bytes": n_bytes, "share": statistics.median(read[n_bytes]) / taken}
                row[phase]["of_memory"] = n_bytes * statistics.median(from_memory[phase]) / taken
                if e.steps is not None:
                    row[phase]["steps"] = e.steps(phase, bare[n_bytes], n_bytes)
        rows.append(row)
    return rows


def describe(row: dict[str, Any]) -> str:
    text = f"{row['format']:5} {row['threads']} threads  {row['engine']:21} "
    text += "".join(f"{row[phase]['tokens']:9.1f} {phase}" for phase in PHASES if phase in row)
    for found in (row[phase] for phase in CONTEXTS if "share" in row.get(phase, {})):
        rate = found["bytes"] * found["tokens"]
        text += f"   {found['bytes'] / 1e6:6.1f} MB {rate / 1e9:5.1f} GB/s {found['share']:5.0%}"
        text += f" {found['of_memory']:5.0%} of memory"
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description="Tokens per second of a decoder.")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument(
        "--llama-python", default=sys.executable, help="a Python that has llama-cpp-python; '' for none"
    )
    options = parser.parse_args(arguments)
    contexts = " and ".join(map(str, CONTEXTS.values()))
    print(f"tokens per second at {contexts} tokens of context, and of a prefill of {PREFILL}")
    for form in options.formats:
        for threads in options.threads:
            rows = measure(form, threads, options.phases, options.llama_python)
            print("\n".join(map(describe, rows)), flush=True)
            keep(form, threads, options.phases, rows)
    return 0


def keep(form: str, threads: int, phases: Sequence[str], rows: list[dict[str, Any]]) -> None:
    """Puts what was measured of a format and number of threads among the results (rule KEPT)."""
    from vivace.base.machine import host
    from vivace.cli.system import machine_facts

    path = RESULTS / "decode.json"
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    for r in before:
        if (r["format"], r["threads"]) == (form, threads):
            r = {k: v for k, v in r.items() if k not in phases}
        if any(phase in r for phase in PHASES):
            kept[r["format"], r["threads"], r["engine"]] = r
    for r in rows:
        key = (r["format"], r["threads"], r["engine"])
        kept[key] = kept.get(key, {}) | r
    rows = sorted(kept.values(), key=lambda r: (FORMATS.index(r["format"]), r["threads"], not _is_ours(r)))
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    found = {"machine": machine_facts(host()), "versions": versions(), "measured_at": now, "rows": rows}
    RESULTS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(found), encoding="utf-8")


def markdown(found: dict[str, Any]) -> str:
    """The table for people. Ratios are of a row's tokens to those of the best other engine of its format."""
    rows = found["rows"]
    heads = ["weights", "threads", "engine"]
    for phase in PHASES:
        shares = ["of bandwidth", "of memory"] if phase in CONTEXTS else []
        heads += [f"{phase} tokens/s", *shares, "over best other"]
    heads.append("notes")
    lines = ["# Decoder", "",
             f"SmolLM2-135M: one token at a context of {CONTEXTS['decode']} (decode) and {CONTEXTS['long']} (long), "
             f"{PREFILL} tokens at once (prefill). `python -m benchmarks.decode`; engines take turns. Above 1, vivace "
             "is faster. In place: the caches lie in arrays with room for more, one token more each call. Of "
             "bandwidth: as a share of a bare loop over as many bytes, which the last level of caches may hold, in "
             "turns; of memory: of such a loop over four times the last level.", "",
             f"{found['machine'].get('cpu', '?')}, {found['machine'].get('used_instruction_set', '?')}; "
             + ", ".join(f"{k} {v}" for k, v in found["versions"].items()) + f"; {found['measured_at']}.", "",
             f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]  # fmt: skip
    for r in rows:
        others = [o for o in rows if (o["format"], o["threads"]) == (r["format"], r["threads"]) and not _is_ours(o)]
        cells, notes = [r["format"], str(r["threads"]), r["engine"]], []
        for phase in PHASES:
            found = r.get(phase, {})
            best = max((o[phase]["tokens"] for o in others if phase in o), default=None)
            cells.append(f"{found['tokens']:.{1 if phase in CONTEXTS else 0}f}" if found else "")
            if phase in CONTEXTS:
                cells += [f"{found[x]:.0%}" if x in found else "" for x in ("share", "of_memory")]
            cells.append(f"{found['tokens'] / best:.2f}" if found and best and _is_ours(r) else "")
            notes += [f"{phase} not quiet"] if found and not found["is_quiet"] else []
        lines.append(f"| {' | '.join([*cells, ', '.join(notes)])} |")
    lines += ["", "## Where the time of a token goes", "",
              "Steps with caches in place, by kernel and the bytes that one touches, in turns with the bare loop. "
              "Other: kinds of little time. Between steps: Python, and handing work over.", ""]  # fmt: skip
    lines += [*table(rows, CONTEXTS), "", "## What the instructions allow", "",
              f"Products of one row and weights in blocks: instructions for {BLOCK} steps and {COLUMNS} columns, "
              "counted in their code (`block_products`). Digits: bytes that stand for an element of the row. At most "
              "two that compute vectors begin in a cycle of a core: so many bytes they let it read.", "",
              *block_products.table()]  # fmt: skip
    return "\n".join([*lines, ""])


def _is_ours(row: dict[str, Any]) -> bool:
    return str(row["engine"]).startswith("vivace")


if __name__ == "__main__":
    sys.exit(main())
