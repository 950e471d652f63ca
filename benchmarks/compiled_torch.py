"""PyTorch's compiler as a contestant: the network that a model was exported from, through `torch.compile`.

    contestant = torch_contestant("resnet50", threads=2, output_names=["logits"])

PyTorch loads no ONNX files, so this is for the models whose networks `benchmarks/models/export_torch.py` builds, and
not for `vivace bench`: a network in a file of PyTorch's own (`.pt2`) is partly pickled, and nothing is loaded here that
could execute. That the network computes what the ONNX file does is checked like every contestant's answer.

Rules:
* FAIR: shapes are fixed, weights are constants (freezing), as the guide of TorchInductor recommends for inference on
  CPUs; bf16 is autocast. Arrays go in and out without copies.

Needs the extra `torch` and a C++ compiler.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
from collections.abc import Mapping, Sequence

import numpy as np

from vivace.base.errors import ProviderError
from vivace.measure.bench import Contestant, Runner


def why_not(name: str) -> str:
    """Why a model cannot be run in PyTorch here; empty where it can."""
    if any(importlib.util.find_spec(package) is None for package in ("torch", "transformers")):
        return "PyTorch is not installed (extra `torch`)"
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        return "torch.compile needs a C++ compiler"
    from benchmarks.models.export_torch import NETWORKS

    return "" if name in NETWORKS else f"{name} was not exported from PyTorch"


def torch_contestant(name: str, threads: int, output_names: Sequence[str], precision: str = "f32") -> Contestant:
    """The network of a model, compiled; outputs get the names of the ONNX model's.

    Raises: ProviderError, when it is loaded, where `why_not` gives a reason.
    """

    def load() -> Runner:
        reason = why_not(name)
        if reason:
            raise ProviderError(reason, where="torch")
        return _compiled(name, threads, output_names, precision)

    return Contestant("torch", _version(), load)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("torch")
    except PackageNotFoundError:
        return ""


def _compiled(name: str, threads: int, output_names: Sequence[str], precision: str) -> Runner:
    import torch
    import torch._inductor.config as inductor
    from benchmarks.models.export_torch import NETWORKS

    torch.set_num_threads(threads)
    inductor.freezing = True
    logging.getLogger("torch").setLevel(logging.ERROR)
    with torch.no_grad():
        network = torch.compile(NETWORKS[name](), dynamic=False)

    def run(inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        tensors = [torch.from_numpy(array) for array in inputs.values()]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            results = network(*tensors)
        results = [results] if isinstance(results, torch.Tensor) else results
        return {key: result.float().numpy() for key, result in zip(output_names, results, strict=True)}

    return run
