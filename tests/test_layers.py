"""The layout of DESIGN.md section 8: imports run one way, files stay small, the trainer is algorithm-blind."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

PACKAGE = REPOSITORY / "distmeta"
FILES = sorted(PACKAGE.rglob("*.py"))
LAYERS = [
    {"core", "seeding", "predictions", "plain"},
    {"policies", "components"},
    {"mlflow_store"},  # what tracking needs of MLflow's own
    {"algorithms", "tasks", "models", "compute", "tracking"},
    {"jobfile", "packing", "jobs_api"},
    {"workers", "combining"},  # parts of the job's section `run`
    {"sections"},
    {"space"},
    {"job"},
    {"runtime"},
    {"learner"},
    {"pictures"},
    {"evaluation", "onetask", "sweeps", "submission", "simulation"},
    {"terminal"},
    {"cli"},
]
"""From low to high; a module or package imports what is below it, and itself."""
LONGEST = 350
"""Lines of a file."""


def parts_imported(path: Path) -> set[str]:
    """The parts of distmeta (`core`, `runtime`, …) that a file imports anywhere, in functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written out, not relative"
            module = node.module or ""
            names |= {f"{module}.{alias.name}" for alias in node.names} if module == "distmeta" else {module}
    return {name.split(".")[1] for name in names if name.startswith("distmeta.")}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def level(part: str) -> int:
    found = [height for height, layer in enumerate(LAYERS) if part in layer]
    assert found, f"distmeta/{part} is in no layer of this test"
    return found[0]


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_one_way(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        return  # the doorstep: it names the verbs, and imports them on first use
    wrong = {other for other in parts_imported(path) if other != part and level(other) >= level(part)}
    assert not wrong, f"{name_of(path)} imports {wrong}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_is_long(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST, f"{name_of(path)} has {lines} lines: what two things is it?"


def test_the_trainer_is_algorithm_blind() -> None:
    compared = re.compile(
        r"algorithm(\.type)? *(==|!=|in [\[({])|type\(.*algorithm\)|isinstance\(.*algorithm\b"
    )
    for path in FILES:
        if part_of(path) != "algorithms":
            hits = [line for line in path.read_text(encoding="utf-8").splitlines() if compared.search(line)]
            assert not hits, f"{name_of(path)}: {hits}"


def test_core_imports_torch_alone() -> None:
    for part, allowed in (("core", {"torch"}), ("seeding", {"numpy", "torch"})):
        nodes = ast.walk(ast.parse((PACKAGE / f"{part}.py").read_text(encoding="utf-8")))
        modules = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        nodes = ast.walk(ast.parse((PACKAGE / f"{part}.py").read_text(encoding="utf-8")))
        modules |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        foreign = {name.split(".")[0] for name in modules} - set(sys.stdlib_module_names)
        assert foreign <= allowed


def test_no_utils() -> None:
    assert not [path for path in FILES if path.stem in ("utils", "util", "helpers", "common", "misc")]
