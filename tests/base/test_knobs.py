"""Knobs: sources and their order, refusals, the generated page."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from vivace.base.errors import InputError
from vivace.base.knobs import Knob, Knobs, knobs, render_knobs


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIVACE_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert knobs.cache_dir == Path("/somewhere/vivace")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert knobs.cache_dir == Path("~/.cache/vivace").expanduser()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", dict[int, object]().__getitem__)  # a user whom the system does not know
    assert knobs.cache_dir == Path("/.cache/vivace")
    assert knobs.threads is None
    assert knobs.check is False
    assert knobs.explain == ()


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("threads", "3", 3),
        ("threads", "", None),
        ("check", "1", True),
        ("cache_bytes", "512MiB", 512 << 20),
        ("cache_bytes", "4 GiB", 4 << 30),
        ("cache_bytes", "1000", 1000),
        ("cache_dir", "~/x", Path("~/x").expanduser()),
        ("explain", "fold, fuse,", ("fold", "fuse")),
        ("isa", "avx2", "avx2"),
        ("isa", "avx512+avx512_vnni", "avx512+avx512_vnni"),
    ],
)
def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch, name: str, text: str, value: object) -> None:
    monkeypatch.setenv(f"VIVACE_{name.upper()}", text)
    assert getattr(knobs, name) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("threads", "0"),
        ("threads", "-1"),
        ("threads", "two"),
        ("check", "yes"),
        ("cache_bytes", "4GB"),
        ("cache_bytes", "-4GiB"),
        ("isa", "avx1024"),
    ],
)
def test_a_bad_value_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    monkeypatch.setenv(f"VIVACE_{name.upper()}", text)
    with pytest.raises(InputError, match=f"VIVACE_{name.upper()}.*Expected"):
        getattr(knobs, name)


def test_an_unknown_variable_is_an_error_that_lists_the_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIVACE_TREADS", "2")
    with pytest.raises(InputError, match=r"VIVACE_TREADS.*VIVACE_THREADS"):
        _ = knobs.check


def test_the_innermost_scope_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIVACE_THREADS", "8")
    with knobs.scope(threads=2, check=True):
        with knobs.scope(threads="3"):
            assert (knobs.threads, knobs.check) == (3, True)
        assert knobs.threads == 2
    assert (knobs.threads, knobs.check) == (8, False)


def test_a_scope_ends_with_an_exception() -> None:
    with pytest.raises(ZeroDivisionError), knobs.scope(threads=2):
        raise ZeroDivisionError
    assert knobs.threads is None


def test_a_scope_does_not_reach_other_threads() -> None:
    seen: list[int | None] = []
    with knobs.scope(threads=2):
        thread = threading.Thread(target=lambda: seen.append(knobs.threads))
        thread.start()
        thread.join()
    assert seen == [None]


@pytest.mark.parametrize("values", [{"treads": 1}, {"threads": "none"}])
def test_a_scope_refuses(values: dict[str, object]) -> None:
    with pytest.raises(InputError, match="Expected"), knobs.scope(**values):
        pass
    assert knobs.threads is None


def test_there_are_at_most_a_dozen_and_each_is_described() -> None:
    every = Knobs.all()
    assert 0 < len(every) <= 12
    assert all(isinstance(k, Knob) and k.doc.endswith(".") and k.form for k in every)
    assert [getattr(Knobs, k.name) for k in every] == list(every)


def test_the_page_is_up_to_date(repository: Path) -> None:
    page = repository / "docs" / "knobs.md"
    assert page.read_text() == render_knobs(), "run `make docs` and commit docs/knobs.md"
