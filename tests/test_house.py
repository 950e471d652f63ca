"""The rules of the house that no single module can hold: floors, doors, the public surface, what a file may say."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import vivace

SOURCE = Path("src/vivace")

# Third-party names and the one folder (or file) that may import each.
DOORS = {
    "onnx": "onnx",
    "llvmlite": "targets",
    "onnxruntime": "providers",
    "openvino": "providers",
    "torch": "providers",
    "typer": "cli",
    "rich": "cli",
}

# Written in pieces, so that this file does not name what it looks for.
FOREIGN_PATH = re.compile(r"(?<![\w.~/-])/(?:" + "|".join(["work", "tmp", "home", "root", "Users", "mnt"]) + r")/[\w.]")

TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".cfg", ".json", ".html", ".svg", ""}


def tracked_files(repository: Path) -> list[Path]:
    """Files of the checkout that git does not ignore."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listing.stdout.split("\0") if name and (path := repository / name).is_file()]


def imported_names(path: Path) -> set[str]:
    """The top-level packages that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def test_imports_go_downward_only(repository: Path) -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    if not linter.exists():
        pytest.skip("import-linter is not installed (extra `check`)")
    result = subprocess.run([linter, "--no-cache"], cwd=repository, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name", DOORS)
def test_a_third_party_name_has_one_door(repository: Path, name: str) -> None:
    source = repository / SOURCE
    intruders = [
        str(path.relative_to(source))
        for path in sorted(source.rglob("*.py"))
        if path.relative_to(source).parts[0] != DOORS[name] and name in imported_names(path)
    ]
    assert intruders == []


def test_the_doors_know_every_dependency(repository: Path) -> None:
    """Only the number libraries may be imported everywhere."""
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    names = {match[0] for text in project["dependencies"] if (match := re.match(r"[\w-]+", text))}
    assert names - DOORS.keys() == {"numpy", "ml_dtypes"}


def test_every_dependency_is_pinned_within_its_bounds(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    lines = (repository / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if line and not line.startswith("#"))
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(text for extra in extras for text in extra)]
    for requirement in map(Requirement, wanted):
        if requirement.name != project["name"]:
            pin = pins.get(requirement.name.lower().replace("_", "-"))
            assert pin is not None and requirement.specifier.contains(pin), f"{requirement} is pinned to {pin}"


def test_links_between_pages_lead_somewhere(repository: Path) -> None:
    broken = [
        f"{page.relative_to(repository)}: {target}"
        for page in tracked_files(repository)
        if page.suffix == ".md"
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert broken == []


def test_pages_name_files_that_exist(repository: Path) -> None:
    stale = [
        f"{page.relative_to(repository)}: {name}"
        for page in tracked_files(repository)
        if page.suffix == ".md" and page.name != "CHANGELOG.md"
        for name in re.findall(r"`((?:src|tests|docs|benchmarks)/[\w./-]+)`", page.read_text(encoding="utf-8"))
        if not (repository / name).exists()
    ]
    assert stale == []


def test_the_public_surface(repository: Path) -> None:
    lines = (repository / "tests" / "public_names.txt").read_text().splitlines()
    expected = {line for line in lines if line and not line.startswith("#")}
    assert set(vivace.__all__) == expected
    assert all(hasattr(vivace, name) for name in vivace.__all__)
    assert len(vivace.__all__) == len(expected)


def test_importing_the_package_stays_light() -> None:
    heavy = ["onnx", "onnxruntime", "openvino", "llvmlite", "torch", "typer", "rich", "google.protobuf"]
    code = f"import sys, vivace; print(*[name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_no_file_names_a_place_on_somebodys_machine(repository: Path) -> None:
    found = []
    for path in tracked_files(repository):
        if path.suffix in TEXT_SUFFIXES and path.name != "LICENSE":
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
                if match := FOREIGN_PATH.search(line):
                    found.append(f"{path.relative_to(repository)}:{number}: {match[0]}")
    assert found == []


def test_files_stay_readable(repository: Path) -> None:
    """No file of code is longer than a reader holds in mind."""
    longest = {
        str(path.relative_to(repository)): n_lines
        for path in tracked_files(repository)
        if path.suffix == ".py" and (n_lines := len(path.read_text(encoding="utf-8").splitlines())) > 600
    }
    assert longest == {}


def test_every_module_says_what_it_is_for(repository: Path) -> None:
    silent = [
        str(path.relative_to(repository))
        for path in sorted((repository / SOURCE).rglob("*.py"))
        if (text := path.read_text(encoding="utf-8").strip()) and not ast.get_docstring(ast.parse(text))
    ]
    assert silent == []
