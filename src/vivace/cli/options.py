"""Options that several verbs share, and how their texts become values."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from vivace.base.errors import InputError
from vivace.base.version import ENGINE_MAGIC

if TYPE_CHECKING:
    import numpy as np

    from vivace.base.dims import Dim
    from vivace.base.specs import TensorSpec

Model = Annotated[Path, typer.Argument(help="The ONNX file.", show_default=False)]
ModelOrEngine = Annotated[Path, typer.Argument(help="The ONNX file, or a saved engine.", show_default=False)]
Shapes = Annotated[list[str], typer.Option("--shapes", metavar="NAME:1x3x224x224,...", help="Shapes of inputs.")]
Inputs = Annotated[
    list[str],
    typer.Option("--input", "-i", metavar="NAME=FILE.npy | FILE.npz", help="Arrays for inputs; others are generated."),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of generated arrays.")]
Absolute = Annotated[float, typer.Option("--atol", help="Tolerance of the outputs, absolute.")]
Relative = Annotated[float, typer.Option("--rtol", help="Tolerance of the outputs, relative.")]
Threads = Annotated[int, typer.Option("--threads", "-t", help="Threads; 0 is all that this process may use.")]


_FIXED = ("f32", "bf16", "f16")


def _fixed(precision: str) -> str:
    """Raises: InputError for `auto`, which needs a tolerance that only `compile` takes, and for what is no format."""
    expected = ", ".join(_FIXED)
    if precision == "auto":
        raise InputError(
            "formats by layer are chosen by vivace compile", where="--precision", expected=expected,
            hint="vivace compile MODEL --precision auto --max-drop 0.01",
        )  # fmt: skip
    if precision not in _FIXED:
        raise InputError(f"{precision!r} is not available", where="--precision", expected=expected)
    return precision


Precision = Annotated[str, typer.Option(help="Numbers between kernels: f32, bf16, f16, auto.")]
FixedPrecision = Annotated[str, typer.Option(help="Numbers between kernels: f32, bf16, f16.", callback=_fixed)]
MaxDrop = Annotated[
    float | None,
    typer.Option(metavar="DROP", help="For --precision auto: how far outputs may be from f32 by --metric.",
                 show_default=False),
]  # fmt: skip
Metric = Annotated[str, typer.Option(help="relative, max_absolute, top1, cosine.")]
Calibration = Annotated[
    list[Path],
    typer.Option(metavar="FILE.npz", help="Inputs to measure errors on; may be given several times."),
]
Provider = Annotated[
    str,
    typer.Option(
        help="native,onnxruntime (what has no kernel runs in onnxruntime); native; onnxruntime; openvino; auto."
    ),
]
Level = Annotated[str, typer.Option(help="Optimization: 0, 1, 2, 3, 99 or disable, basic, extended, layout, all.")]
Disable = Annotated[list[str], typer.Option(metavar="RULE,...", help="Rules to leave out.")]
Target = Annotated[str, typer.Option(help="host, or an instruction set: sse, avx2, avx512, avx512+avx512_vnni, ...")]
Tune = Annotated[str, typer.Option(help="How much to measure for choosing kernels: off, fast, full.")]
TuneBudget = Annotated[float, typer.Option(metavar="SECONDS", min=0, help="Seconds of tuning; 0 is the effort's own.")]
TimingCache = Annotated[
    Path | None,
    typer.Option(metavar="FILE", show_default=False,
                 help="What tuning measured, read and written beside the machine's own cache; --tune off only reads."),
]  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

ENGINE_SUFFIX = ".vivace"
NOTHING_TO_COMPARE = "a saved engine has no other engine to compare with"
_MOST_BYTES = 1 << 42  # of an array: as of a tensor in a model
LEVELS = {"disable": 0, "basic": 1, "extended": 2, "layout": 3, "all": 99, "0": 0, "1": 1, "2": 2, "3": 3, "99": 99}


def split(*texts: str) -> tuple[str, ...]:
    """Words with commas between."""
    return tuple(word.strip() for text in texts for word in text.split(",") if word.strip())


def shapes_of(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Those of `--shapes`, which may be given several times. Raises: InputError, as `parse_shapes` does."""
    from vivace.measure.inputs import parse_shapes

    return parse_shapes(",".join(texts))


def level_of(text: str) -> int:
    """Raises: InputError for an unknown level."""
    if text.lower() not in LEVELS:
        raise InputError(f"unknown level {text!r}", where="--level", expected=f"one of {', '.join(LEVELS)}")
    return LEVELS[text.lower()]


def threads_of(count: int) -> int:
    """0 stands for every core that arithmetic profits from. Raises: InputError below 0, and above what a team takes."""
    from vivace.base.knobs import knobs
    from vivace.base.machine import host
    from vivace.targets.cpu.team import MAX_THREADS

    if not 0 <= count <= MAX_THREADS:
        raise InputError(f"{count} threads", where="--threads", expected=f"0 to {MAX_THREADS}")
    return count or knobs.threads or host().n_compute_threads


def is_saved(path: Path) -> bool:
    """Whether a file is an engine of ours rather than a model: by its name, or else by its first bytes."""
    if path.suffix == ENGINE_SUFFIX or not path.is_file():
        return path.suffix == ENGINE_SUFFIX
    with path.open("rb") as file:
        return file.read(len(ENGINE_MAGIC)) == ENGINE_MAGIC


def check_model(path: Path, or_engine: bool = False) -> None:
    """Raises: InputError where there is no file, or a saved engine where only a model will do."""
    if not path.exists() or path.is_dir():
        wanted = "an ONNX model or a saved engine" if or_engine else "an ONNX model"
        raise InputError("is a folder" if path.is_dir() else "no such file", where=str(path), expected=wanted)
    if is_saved(path) and not or_engine:
        raise InputError("is a saved engine", where=str(path), expected="an ONNX model",
                         hint="the model that it was compiled from")  # fmt: skip


def check_output(path: Path | None, source: Path | None = None) -> None:
    """Raises: InputError where no file can be written, or where it would replace its own source; called before the work
    whose result it is to hold."""
    if path is None:
        return
    if source is not None and path.exists() and path.samefile(source):
        raise InputError("is the model itself", where=str(path), expected="another file", hint="another --output")
    if path.exists() and not path.is_file():
        raise InputError("is no regular file", where=str(path), expected="a file, or a name that is free")
    if not path.parent.is_dir():
        raise InputError("the folder does not exist", where=str(path.parent), hint=f"mkdir -p {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise InputError("the folder may not be written", where=str(path.parent), hint="another folder")


def check_timings(path: Path | None) -> None:
    """Raises: InputError for a file that holds something else: lines would be added to it."""
    from vivace.lower.timings import refuse_other_file

    check_output(path)
    if path is not None:
        refuse_other_file(path)


def is_native(provider: str) -> bool:
    """Whether our own compiler has a part in the engine, and no other engine runs all of it."""
    return provider == "auto" or "native" in split(provider)


def read_arrays(inputs: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of `--input` options, by input name. Raises: InputError for what cannot be read."""
    arrays: dict[str, np.ndarray] = {}
    for text in inputs:
        name, equals, file = text.partition("=")
        # A file may have '=' in its name, and the name of a tensor nearly never ends in .npz.
        arrays.update(_read_archive(Path(text)) if text.endswith(".npz") and not _is_named(text) else {})
        if not text.endswith(".npz") or _is_named(text):
            if not equals:
                raise InputError(f"cannot read {text!r}", where="--input", expected="NAME=FILE.npy or FILE.npz")
            arrays[name] = _read_array(Path(file))
    return arrays


def write_archive(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """A .npz file, as a whole or not at all."""
    import io

    import numpy as np

    from vivace.base.cache import write_atomic

    held = io.BytesIO()
    np.savez(held, allow_pickle=False, **arrays)
    write_atomic(path, [held.getbuffer()])


def read_samples(files: Sequence[Path]) -> list[dict[str, np.ndarray]]:
    """The arrays of each file by input name. Raises: InputError for what cannot be read."""
    for file in files:
        if not file.is_file():
            raise InputError("no such file", where=str(file), expected="a .npz file with one array per input")
    return [_read_archive(file) for file in files]


def _is_named(text: str) -> bool:
    return "=" in text and not Path(text).exists()


def _read_array(path: Path) -> np.ndarray:
    import numpy as np

    with _opened(path, "an array", "a .npy file") as file:
        found = np.load(file, allow_pickle=False)
    if not isinstance(found, np.ndarray):
        raise InputError("holds several arrays", where=str(path), expected="a .npy file", hint="--input FILE.npz")
    return found


def _read_archive(path: Path) -> dict[str, np.ndarray]:
    import numpy as np

    with _opened(path, "arrays", "a .npz file") as file:
        found = np.load(file, allow_pickle=False)
        if isinstance(found, np.ndarray):
            raise ValueError("it is one array without a name")
        with found as archive:
            return {name: archive[name] for name in archive.files}


@contextmanager
def _opened(path: Path, what: str, expected: str) -> Iterator[BinaryIO]:
    """The file, for NumPy to read. Raises: InputError for whatever NumPy raises."""
    import zipfile
    import zlib

    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror or error})", where=str(path), expected=expected) from error
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        # NumPy takes what is no file of its own for a pickle, and advises to trust it.
        why = "Python objects, or no file of NumPy's" if "pickle" in str(error) else str(error)
        raise InputError(f"cannot read {what}: {why}", where=str(path), expected=expected) from error


def gather(
    specs: Sequence[TensorSpec], shapes: Mapping[str, Sequence[int]], inputs: Sequence[str], seed: int,
    learnt: tuple[Sequence[TensorSpec], Iterable[Dim]] | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, int]]:  # fmt: skip
    """Arrays for all inputs (given or generated), checked, and the sizes of all symbols. `learnt` are the inputs and
    the demands of branches as our importer understands them, which says more of the sizes that make sense."""
    from vivace.measure.inputs import bind, check_arrays, choose_shapes, generate

    given = read_arrays(inputs)
    unknown = [name for name in given if name not in {spec.name for spec in specs}]
    if unknown:
        names = ", ".join(spec.name for spec in specs)
        raise InputError(f"the model has no input {unknown[0]!r}", where="--input", expected=f"one of {names}")
    known: Mapping[str, Sequence[int]] = {**shapes, **{name: array.shape for name, array in given.items()}}
    if learnt is not None and known.keys() < {spec.name for spec in specs}:
        known = choose_shapes(learnt[0], known, learnt[1])[0]
    chosen, sizes = choose_shapes(specs, known)
    for spec in specs:
        if spec.name not in given and math.prod(chosen[spec.name]) * spec.dtype.size_bytes > _MOST_BYTES:
            text = "x".join(map(str, chosen[spec.name]))
            raise InputError(f"an array of {text} is too large", where=f"input {spec.name!r}",
                             expected=f"at most {_MOST_BYTES} bytes", hint="smaller --shapes")  # fmt: skip
    arrays = generate([spec for spec in specs if spec.name not in given], chosen, seed)
    ordered = {spec.name: given.get(spec.name, arrays.get(spec.name)) for spec in specs}
    complete = {name: array for name, array in ordered.items() if array is not None}
    check_arrays(specs, complete)
    bind(specs, {name: array.shape for name, array in complete.items()})
    return complete, sizes
