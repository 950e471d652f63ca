"""What every test stands on: no test reads or writes the user's cache, and none sees the user's knobs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "vivace",
    deadline=None,  # a busy neighbour is no failure
    derandomize=True,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("vivace")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache for the whole run, processes of pytest-xdist included, so that a kernel is compiled once, and an
    environment without knobs."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("VIVACE_")}
    for name in kept:
        del os.environ[name]
    folder = tmp_path_factory.getbasetemp()
    os.environ["VIVACE_CACHE_DIR"] = str((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "cache")
    yield
    del os.environ["VIVACE_CACHE_DIR"]
    os.environ.update(kept)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).parents[1]
