"""The README is short, its links lead somewhere, and CI runs its test command."""

from __future__ import annotations

import re

from conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
TEST_COMMAND = "pip install -q --no-compile -e '.[test]' && pytest -n 2\n"
MOST_LINES = 150


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= MOST_LINES


def test_jobs_and_files_that_the_readme_names_exist() -> None:
    for job in set(re.findall(r"jobs/[\w-]+\.yaml", README)):
        assert (REPOSITORY / job).is_file(), job
    for target in re.findall(r"\]\((\w[\w/.-]*)\)", README):
        assert (REPOSITORY / target).exists(), target


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert TEST_COMMAND in README
    assert TEST_COMMAND in (REPOSITORY / ".ci" / "run").read_text()
