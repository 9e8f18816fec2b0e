"""The manual's code runs as it stands there, and its links and job snippets are right.

How a page is run, from top to bottom in an empty folder: a block with a title is written to that file. A block in
`bash` is run line by line, with fewer steps. A block in `python` without a title is executed. A block in `yaml` without
a title is a part of a job and is checked. Blocks in `console` and `text` are only shown.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import REPOSITORY, tree

from distmeta.cli.main import main
from distmeta.config.job import Job
from distmeta.config.yaml_text import parse_yaml

DOCS = REPOSITORY / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if path.parent.name != "notebooks")
BLOCK = re.compile(r"^( *)```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
QUICK = ["run.steps=4", "run.eval_every=2", "run.eval_tasks=4", "tracking.type=none"]


class Block(NamedTuple):
    language: str
    title: str
    text: str


def read_blocks(page: Path) -> list[Block]:
    blocks = []
    for indent, language, title, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        lines = [line.removeprefix(indent) for line in text.splitlines()]
        blocks.append(Block(language, title, "\n".join(lines) + "\n"))
    return blocks


def run_command(line: str) -> None:
    """Run a command of distmeta in this process, with fewer steps."""
    program, verb, *rest = shlex.split(line, comments=True)
    assert program == "distmeta", f"only distmeta's own commands are run: {line}"
    more = QUICK if verb == "train" else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["distmeta", verb, *rest, *more])
        with pytest.raises(SystemExit) as end:
            main()
    assert end.value.code == 0, line


def is_run(block: Block) -> bool:
    return block.language == "bash" or (block.language == "python" and not block.title)


@pytest.fixture
def reader(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The empty folder of a reader who follows the page. The modules that the page writes are forgotten afterwards."""
    monkeypatch.setattr(sys, "path", [str(workplace), *sys.path])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workplace}/mlflow.db")
    yield workplace
    for path in workplace.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_code_on_the_page_runs(page: Path, reader: Path) -> None:
    blocks = read_blocks(page)
    if not any(is_run(block) or block.language == "yaml" for block in blocks):
        pytest.skip("nothing to run")
    for block in blocks:
        if block.title:
            (reader / block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "yaml":
            check_section(block.text)
        elif block.language == "bash":
            for line in block.text.splitlines():
                run_command(line)
        elif block.language == "python":
            exec(compile(block.text, str(page), "exec"), {"__name__": page.stem})


def check_section(text: str) -> None:
    """Check a part of a job, in a small job around it. Parts of the reader's own cannot be imported here."""
    sections = parse_yaml(text, "docs")
    own_parts = [
        name
        for name, section in sections.items()
        if ":" in str(section.get("type", "") if isinstance(section, dict) else "")
    ]
    shown = {name: section for name, section in sections.items() if name not in own_parts}
    Job.parse(tree(run={"workers": 2}) | shown)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_files_that_the_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in set(re.findall(r"\b(?:jobs|clusters|benchmarks|tests|distmeta)/[\w./-]*\w", text)):
        assert (REPOSITORY / name).exists(), name


def test_every_page_is_in_the_navigation() -> None:
    navigation = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES:
        assert f": {page.relative_to(DOCS)}\n" in navigation, page
