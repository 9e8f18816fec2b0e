"""What a checkpoint may name. tests/fuzz/test_fuzz.py tests models, tasks and algorithms of strangers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import tree

import distmeta
from distmeta.config.job import Job
from distmeta.runtime import checkpoint as checkpoints


@pytest.fixture
def run(workplace: Path) -> Path:
    return distmeta.train(Job.parse(tree("maml", run={"steps": 1, "eval_tasks": 2}))).run


def change_stored_job(run: Path, **sections: Any) -> None:
    path = checkpoints.find(run) / "state.json"
    state = json.loads(path.read_text())
    state["job"] |= sections
    path.write_text(json.dumps(state))


def test_strategy_of_a_checkpoint_is_not_imported(run: Path) -> None:
    expected = distmeta.evaluate(run)
    change_stored_job(run, strategy={"type": "nowhere:Strategy"})
    messages: list[str] = []
    assert distmeta.evaluate(run, report=messages.append) == expected
    assert messages == []


@pytest.mark.parametrize(
    "tracking", [{"type": "nowhere:Tracker"}, [{"type": "nowhere:Tracker"}, {"type": "none"}]]
)
def test_tracker_of_a_checkpoint_is_not_imported_unless_it_is_distmetas(run: Path, tracking: Any) -> None:
    expected = distmeta.evaluate(run)
    change_stored_job(run, tracking=tracking)
    messages: list[str] = []
    assert distmeta.evaluate(run, report=messages.append) == expected
    assert messages == ["tracking: the tracker 'nowhere:Tracker' that the checkpoint names is not used"]
