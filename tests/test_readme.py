"""The README's code runs as it stands there, and its test command is CI's."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_own_model_tasks_and_algorithm(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    *module, program = blocks("python")
    (workplace / "mine.py").write_text("\n".join(module))
    (workplace / "mine.yaml").write_text(blocks("yaml")[0])
    monkeypatch.setattr(sys, "path", [str(workplace), *sys.path])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workplace}/mlflow.db")
    scope: dict[str, object] = {}
    try:
        exec(compile(program, "README.md", "exec"), scope)
    finally:
        sys.modules.pop("mine", None)
    figures = __import__("distmeta").evaluate(scope["run"]).figures
    assert figures["loss_after"] < 0.5 * figures["loss_before"]


def test_commands_and_jobs_that_it_names_exist() -> None:
    for job in set(re.findall(r"jobs/[\w-]+\.yaml", README)):
        assert (REPOSITORY / job).is_file(), job
    for folder in re.findall(r"\]\((\w[\w/.-]*)\)", README):
        assert (REPOSITORY / folder).exists(), folder


def test_ci_runs_the_test_command() -> None:
    assert "pip install -q --no-compile -e '.[test]' && pytest -n 2\n" in README
    assert (
        "pip install -q --no-compile -e '.[test]' && pytest -n 2\n"
        in (REPOSITORY / ".ci" / "run").read_text()
    )
