"""A training from its start to its end: what it leaves to a resume."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from conftest import tree
from support.outcomes import train_job

from distmeta.runtime import checkpoint as checkpoints
from distmeta.tracking import background
from distmeta.tracking.interface import StepRecord, TrackedRun


class LateTracker:
    """Its store answers for the first time when the run has saved step 6. It calls the run by its folder's name."""

    last_step = 0
    known_ids: list[str | None] = []  # noqa: RUF012 - shared by all runs of this test

    def __init__(self, run: TrackedRun):
        self.run = run
        self.run_id = run.run_id
        self.known_ids.append(run.run_id)

    def open(self) -> None:
        latest = self.run.folder / "checkpoints" / "latest"
        deadline = time.monotonic() + 60
        while not latest.exists() or latest.read_text() < "step-00000006":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        self.run_id = self.run.name

    def log_step(self, record: StepRecord) -> None: ...
    def log_artifact(self, path: Path, folder: str) -> None: ...
    def close(self, status: str) -> None: ...


@pytest.fixture
def late_job(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A job whose tracker does not know its run's id until the last step is saved."""
    monkeypatch.setattr(background, "OPEN_SECONDS", 0.0)
    monkeypatch.setattr(LateTracker, "known_ids", [])
    return tree("maml", tracking={"type": f"{__name__}:LateTracker"})


def test_tracking_id_that_is_known_after_the_last_save_is_kept(late_job: dict[str, Any]) -> None:
    run = train_job(late_job, name="late")
    assert checkpoints.load(run).progress.tracking_ids == {f"{__name__}:LateTracker": "late"}
    train_job(late_job, resume=run, name="late", steps=8)
    assert LateTracker.known_ids == [None, "late"]


def test_tracking_id_of_a_run_with_nothing_to_do_is_kept(late_job: dict[str, Any]) -> None:
    run = train_job(late_job | {"tracking": {"type": "none"}}, name="done")
    train_job(late_job, resume=run, name="done")
    assert checkpoints.load(run).progress.tracking_ids == {f"{__name__}:LateTracker": "done"}
