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
SECONDS = 0.4  # per measurement


class Model:
    """One loaded model with an empty context."""

    def __init__(self, path: str, threads: int) -> None:
        self.llm = llama_cpp.Llama(
            path,
            n_ctx=TOKENS,
            n_threads=threads,
            n_threads_batch=threads,
            n_batch=512,
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
        return time.perf_counter() - start


def without_amx() -> None:
    """Plain weights: the kernels of llama.cpp 0.3.36 for AMX end with an illegal instruction on Emerald Rapids."""
    usual = llama_cpp.llama_cpp.llama_model_default_params

    def changed() -> llama_cpp.llama_model_params:
        params = usual()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_cpp.llama_model_default_params = changed


def main() -> None:
    without_amx()
    path, threads = sys.argv[1], int(sys.argv[2])
    model = Model(path, threads)
    stream = json.loads(sys.stdin.readline())
    print("ready", llama_cpp.__version__, flush=True)
    for line in sys.stdin:
        what, count = line.split()
        if what == "prefill":
            tokens, past = stream[: int(count)], 0
        else:
            past = int(count)
            model.run(stream[:past], 0)
            tokens = stream[past : past + 1]
        model.run(tokens, past)
        times: list[float] = []
        end = time.perf_counter() + SECONDS
        while time.perf_counter() < end or len(times) < 2:
            times.append(model.run(tokens, past))
        print(float(np.median(times)), flush=True)


if __name__ == "__main__":
    main()
