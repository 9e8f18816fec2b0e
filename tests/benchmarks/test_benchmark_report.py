"""The benchmark report: its tables are made from the raw results, and it stays short."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"
SCRIPTS = sorted(BENCHMARKS.glob("*.py"))


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch):
    """The module benchmarks/report.py."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import report  # pyright: ignore[reportMissingImports]

    yield report
    for name in ("report", "raw_results"):
        sys.modules.pop(name, None)


def test_tables_are_made_from_the_raw_results(report) -> None:
    text = report.REPORT.read_text(encoding="utf-8")
    assert report.rewrite_tables(text) == text
    assert sorted(found[2] for found in report.BLOCK.finditer(text)) == sorted(report.TABLES)


def test_every_raw_result_is_in_a_table(report) -> None:
    shown = {
        (table.study, part) for table in report.TABLES.values() for part in parts_of_table(report, table)
    }
    files = [path for path in (BENCHMARKS / "results").rglob("*") if path.is_file()]
    stored = {(path.stem, part) for path in files for part in report.load_study(path.stem)}
    assert {path.suffix for path in files} == {".json"}
    assert shown == stored


def parts_of_table(report, table) -> tuple[str, ...]:
    return table.parts or tuple(report.load_study(table.study))


def test_every_table_states_its_origin(report) -> None:
    for name, table in report.TABLES.items():
        origin = report.format_table(table).splitlines()[0]
        assert re.search(r"`python benchmarks/\w+\.py[^`]*`, \d{4}-\d\d-\d\d, commit [0-9a-f]{7}", origin), (
            name
        )
        assert re.search(r"\(.*\d+ cores, \d+ GiB, .*\):$", origin), name


def test_report_has_at_most_2200_words(report) -> None:
    assert len(report.REPORT.read_text(encoding="utf-8").split()) <= 2200


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_say_what_they_show(path: Path) -> None:
    """Every script has a docstring; one that can be run states its command in it."""
    text = path.read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring is not None
    if '__name__ == "__main__"' in text:
        assert f"python benchmarks/{path.name}" in docstring


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_import_names_that_exist(path: Path) -> None:
    """Scripts are run by hand, so a renamed function of the package would go unnoticed."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "distmeta":
            module = importlib.import_module(node.module)
            for imported in node.names:
                if imported.name not in vars(module):
                    importlib.import_module(f"{node.module}.{imported.name}")
