"""What every test stands on: no test reads or writes the user's cache, and none sees the user's knobs."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from vivace.base.cache import Cache
from vivace.base.machine import Isa
from vivace.targets.cpu import jit
from vivace.targets.cpu.code import KernelCode, Optimize

settings.register_profile(
    "vivace",
    deadline=None,  # a busy neighbour is no failure
    derandomize=True,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("vivace")

# A shell starts what it runs in the background with interrupts ignored, which the processes of tests inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache for the whole run, processes of pytest-xdist included, so that a kernel is compiled once, and an
    environment without knobs."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("VIVACE_")}
    for name in kept:
        del os.environ[name]
    os.environ["VIVACE_CACHE_DIR"] = str(_shared(tmp_path_factory) / "cache")
    yield
    del os.environ["VIVACE_CACHE_DIR"]
    os.environ.update(kept)


@pytest.fixture(scope="session", autouse=True)
def _same_text_same_code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """LLVM sees each text once in the whole run, also where a test leaves the cache out: it takes most of the time.
    `tests/targets/test_jit.py`, which is about LLVM, does without."""
    cache = Cache(_shared(tmp_path_factory) / "objects", 1 << 30)

    @functools.wraps(jit.compile_text)
    def compile_text(text: str, isa: Isa, optimize: Optimize = "full", name: str = "module") -> bytes:
        key = jit.object_key(KernelCode(name, text, (), (), optimize=optimize), isa)
        found = cache.get("object", key)
        if found is None:
            found = compile_text.__wrapped__(text, isa, optimize, name)  # type: ignore[attr-defined]
            cache.put("object", key, found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jit, "compile_text", compile_text)
        yield


def _shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all processes of a run."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).parents[1]
