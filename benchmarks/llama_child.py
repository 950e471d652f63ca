"""llama.cpp in a process of its own (`benchmarks/decode.py`): its threads and allocator stay apart from the others'.

    python benchmarks/llama_child.py MODEL.gguf THREADS

Reads one line per measurement, `decode PAST` or `prefill TOKENS`, and answers with the seconds of one call, the median
of some. Logits are computed for all tokens, as the ONNX file does. Needs llama-cpp-python, and nothing of vivace.
"""

from __future__ import annotations

import json
import sys
import time

import llama_cpp
import numpy as np

TOKENS = 1024
SECONDS = 0.25  # per measurement


class Model:
    """One loaded model with an empty context."""

    def __init__(self, path: str, threads: int) -> None:
        self.n_held = 0  # tokens of the stream in the cache
        self.llm = llama_cpp.Llama(
            path,
            n_ctx=TOKENS,
            n_threads=threads,
            n_threads_batch=threads,
            n_batch=TOKENS,
            n_ubatch=512,
            logits_all=True,
            verbose=False,
        )

    def run(self, tokens: list[int], past: int) -> float:
        """Seconds of one call with `past` tokens kept."""
        context = self.llm._ctx
        context.kv_cache_seq_rm(-1, past, -1)
        self.llm._batch.set_batch(batch=tokens, n_past=past, logits_all=True)
        start = time.perf_counter()
        context.decode(self.llm._batch)
        llama_cpp.llama_synchronize(context.ctx)
        self.n_held = past + len(tokens)
        return time.perf_counter() - start


def main() -> None:
    path, threads = sys.argv[1], int(sys.argv[2])
    model = Model(path, threads)
    stream = json.loads(sys.stdin.readline())
    print("ready", llama_cpp.__version__, flush=True)
    ready: set[str] = set()
    for line in sys.stdin:
        what, count = line.split()
        if what == "prefill":
            tokens, past = stream[: int(count)], 0
        else:
            past = int(count)
            if model.n_held < past:
                model.run(stream[:past], 0)
            tokens = stream[past : past + 1]
        first = model.run(tokens, past)
        times = [first] if line in ready and first > SECONDS else []
        ready.add(line)
        end = time.perf_counter() + (0 if times else SECONDS)
        while time.perf_counter() < end or not times:
            times.append(model.run(tokens, past))
        print(float(np.median(times)), flush=True)


if __name__ == "__main__":
    main()
