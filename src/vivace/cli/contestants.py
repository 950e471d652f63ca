"""Engines by name, for the verbs that run a model: our own, ONNX Runtime and OpenVINO behind the same interface."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from vivace.base.errors import InputError, ProviderError
from vivace.cli.options import check_model, is_native, is_saved

if TYPE_CHECKING:
    from vivace.base.dims import Dim
    from vivace.base.specs import TensorSpec
    from vivace.measure.bench import Contestant, Runner
    from vivace.providers.provider import Session


@dataclass(frozen=True, slots=True)
class Job:
    """A model and how to prepare it; equal for all engines that are compared."""

    model: Path
    threads: int = 1
    precision: str = "f32"
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    level: int = 99
    disable: tuple[str, ...] = ()
    target: str = "host"
    cache: bool = True
    tune: str = "off"
    tune_budget: float = 0.0
    timing_cache: str = ""


def open_engine(provider: str, job: Job, progress: Any = None) -> Session:
    """Loads the model: with our compiler where `provider` says native or auto, else with the named engine."""
    check_model(job.model, or_engine=True)
    if is_saved(job.model):
        return _open_saved(provider, job)
    from vivace.options import provider_names

    names = provider_names(provider)
    if is_native(provider):
        import vivace

        return cast(
            "Session",
            vivace.compile(
                job.model,
                precision=job.precision,
                threads=job.threads,
                providers=names,
                target=job.target,
                cache=job.cache,
                tune=job.tune,
                tune_budget=job.tune_budget or None,
                timing_cache=job.timing_cache or None,
                shapes=job.shapes or None,
                level=job.level,
                disable=job.disable,
                progress=progress,
            ),
        )
    from vivace.providers.provider import LoadOptions, find

    options = LoadOptions(
        threads=job.threads,
        precision=cast(Any, job.precision),
        level=job.level,
        shapes=job.shapes,
        dims=job.sizes,
    )
    return find(provider).load(job.model, options)


def input_specs(job: Job) -> tuple[TensorSpec, ...]:
    """The model's inputs as ONNX Runtime reads them, or a saved engine's.

    Raises: ModelError for a damaged model, from our reader, which says better what is wrong with it.
    """
    check_model(job.model, or_engine=True)
    if is_saved(job.model):
        return open_engine("native", job).inputs
    try:
        return open_engine("onnxruntime", replace(job, precision="f32", level=0, shapes={})).inputs
    except ProviderError:
        from vivace.onnx.reader import read

        read(job.model)
        raise


def learnt_inputs(job: Job) -> tuple[Sequence[TensorSpec], Iterable[Dim]] | None:
    """The inputs of a model as our importer understands them, and what its branches ask of their sizes; None where it
    cannot read the model."""
    from vivace.base.errors import VivaceError
    from vivace.base.specs import TensorSpec
    from vivace.graph.sizes import inner_demands
    from vivace.onnx.importer import import_model

    if is_saved(job.model):
        return None
    try:
        graph = import_model(job.model)
    except VivaceError:
        return None
    return tuple(TensorSpec(v.name, v.dtype, v.shape) for v in graph.inputs), tuple(inner_demands(graph))


def demands_of(engine: object) -> tuple[Dim, ...]:
    """What the branches of a compiled model ask of the sizes of its inputs."""
    image = getattr(engine, "image", None)
    return tuple(line.lacks for line in image.lines if line.kind == "demand") if image is not None else ()


def _open_saved(provider: str, job: Job) -> Session:
    if not is_native(provider):
        raise InputError("a saved engine runs natively only", where=str(job.model), expected="--provider native")
    default = Job(job.model)
    for option in ("precision", "target", "level", "tune", "timing_cache", "disable"):
        if getattr(job, option) != getattr(default, option):
            raise InputError("a saved engine stays as it was compiled", where=f"--{option.replace('_', '-')}",
                             expected="an ONNX model", hint="vivace compile with this option")  # fmt: skip
    import vivace

    return cast("Session", vivace.load(job.model, threads=job.threads))


def version_of(provider: str) -> str:
    """The version of an engine's package."""
    if is_native(provider):
        from vivace import __version__

        return __version__
    from vivace.providers.provider import availability

    return availability(provider).version


def label_of(provider: str) -> str:
    """The name in tables."""
    return "vivace" if is_native(provider) else provider


def contestant(provider: str, job: Job, progress: Any = None) -> Contestant:
    """The engine for `vivace.measure.bench`."""
    from vivace.measure.bench import Contestant

    def load() -> Runner:
        return open_engine(provider, job, progress).run

    return Contestant(label_of(provider), version_of(provider), load)
