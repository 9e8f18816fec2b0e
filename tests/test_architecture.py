"""The layout: imports run one way without circles, few modules at the root, and a trainer that knows no algorithm."""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from conftest import REPOSITORY

PACKAGE = REPOSITORY / "distmeta"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = [
    {"errors", "seeding", "trees"},
    {"protocols", "files"},
    {"trajectories"},
    {"compute"},
    {"algorithms", "tasks", "models", "tracking"},
    {"data"},
    {"config"},
    {"runtime"},
    {"strategies"},
    {"evaluation", "cluster", "sweeps", "simulation"},
    {"cli"},
]
"""From low to high. A module imports from layers below its own and from its own package."""
ALLOWED_WITHIN_LAYER = {("sweeps", "evaluation")}
"""Imports between two packages of one layer, in one direction."""
MOST_ROOT_MODULES = 8


def find_imports(path: Path) -> set[str]:
    """Return the modules of distmeta that a file imports anywhere, also inside functions.

    Imports under `if TYPE_CHECKING:` never run and do not count.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    never_run: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            never_run.update(child for statement in node.body for child in ast.walk(statement))
    names = set()
    for node in ast.walk(tree):
        if node in never_run:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written out, not relative"
            module = node.module or ""
            names.add(module)
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.startswith("distmeta.")}


def name_module(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts)


def find_layer(part: str) -> int:
    for height, layer in enumerate(LAYERS):
        if part in layer:
            return height
    raise AssertionError(f"distmeta/{part} is in no layer of this test")


def relative(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_run_one_way(path: Path) -> None:
    own_part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own_part in ("__init__", "__main__"):
        return  # the front door: it imports on first use
    for name in find_imports(path):
        part = name.split(".")[1]
        if part == own_part or (own_part, part) in ALLOWED_WITHIN_LAYER:
            continue
        assert find_layer(part) < find_layer(own_part), f"{relative(path)} imports {name}"


def test_no_import_circles() -> None:
    """Also none inside a package, and none through imports inside functions."""
    modules = {name_module(path): path for path in FILES}
    graph = {name: find_imports(path) & modules.keys() for name, path in modules.items()}
    del graph["distmeta"]
    finished: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import circle: {' -> '.join([*trail[trail.index(name) :], name])}"
        if name in finished:
            return
        for target in graph.get(name, ()):
            if target != name:
                visit(target, (*trail, name))
        finished.add(name)

    for name in graph:
        visit(name, ())


def test_few_modules_lie_at_the_root() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_ROOT_MODULES


def test_no_two_classes_share_a_name() -> None:
    """A name means one thing in the whole package. Private classes of one file are not counted."""
    places = defaultdict(list)
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(relative(path))
    shared = {name: found for name, found in places.items() if len(found) > 1}
    assert not shared


def test_only_algorithms_know_algorithms() -> None:
    comparison = re.compile(
        r"algorithm(\.type)? *(==|!=|in [\[({])|type\(.*algorithm\)|isinstance\(.*algorithm, *[A-Z]\w*(?<!\w)"
    )
    for path in FILES:
        part = path.relative_to(PACKAGE).parts[0]
        if part != "algorithms":
            hits = [line for line in path.read_text(encoding="utf-8").splitlines() if comparison.search(line)]
            assert not hits, f"{relative(path)}: {hits}"


def test_capabilities_are_tested_with_isinstance() -> None:
    """`getattr` with a default and `hasattr` are for third-party objects, with a comment on the line or above it."""
    for path in FILES:
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            suspicious = re.search(r"\bhasattr\(|\bgetattr\([^()]+(\([^()]*\))?,[^()]+,[^()]+\)", line)
            explained = "#" in line or lines[number - 1].lstrip().startswith("#")
            assert not suspicious or explained, f"{relative(path)}:{number + 1}: {line.strip()}"


def test_mlflow_is_imported_by_one_package() -> None:
    for path in FILES:
        imported = re.search(r"^\s*(from|import) mlflow\b", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert not imported or path.relative_to(PACKAGE).parts[0] == "tracking", relative(path)


@pytest.mark.parametrize(
    ("part", "allowed"), [("protocols", {"torch"}), ("seeding", {"numpy", "torch"}), ("errors", set())]
)
def test_foundation_imports_little(part: str, allowed: set[str]) -> None:
    modules = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{part}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            modules.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
    assert modules - set(sys.stdlib_module_names) <= allowed


def test_modules_are_not_called_utils() -> None:
    vague = ("utils", "util", "helpers", "common", "misc")
    assert not [path for path in FILES if path.stem in vague]
