"""A strategy that loses theta: the run returns to its last checkpoint, a limited number of times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import tree
from support.outcomes import ActingReporter, read_outcome, train_job

from distmeta.config.sections import OuterSection
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.checkpoint import TrainingState
from distmeta.runtime.failure_policy import LostShardError
from distmeta.runtime.strategy import LostStateError
from distmeta.strategies.driver import Driver
from distmeta.tracking.interface import StepRecord, TrackedRun

RUN = {"steps": 4, "tasks_per_step": 4, "eval_every": 2, "eval_tasks": 4, "checkpoint_every": 2}


class ForgetfulDriver(Driver):
    """Loses theta in step 4, `most_losses` times."""

    most_losses = 2
    losses = 0
    is_lost = False

    def apply(self) -> float:
        norm = super().apply()
        if self.state().outer["clock"] == 4 and ForgetfulDriver.losses < ForgetfulDriver.most_losses:
            ForgetfulDriver.losses += 1
            self.is_lost = True
            raise LostStateError("theta is gone")
        return norm

    def state(self) -> TrainingState:
        if self.is_lost:
            raise LostStateError("theta is gone")
        return super().state()

    def load(self, state: TrainingState, outer: OuterSection) -> None:
        self.is_lost = False
        super().load(state, outer)


class RecordingTracker:
    """Keeps the steps that it is told."""

    run_id = None
    last_step = 0
    steps: list[int] = []  # noqa: RUF012 - shared by all runs of this test

    def __init__(self, run: TrackedRun): ...
    def open(self) -> None: ...
    def log_artifact(self, path: Path, folder: str) -> None: ...
    def close(self, status: str) -> None: ...

    def log_step(self, record: StepRecord) -> None:
        self.steps.append(record.step)


def test_state_that_is_lost_repeatedly_ends_the_run_with_its_checkpoint(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that are taken twice are written and tracked once."""
    job: dict[str, Any] = tree("maml", run=RUN | {"max_shard_failures": 2})
    expected = read_outcome(train_job(job))
    job["strategy"] = {"type": f"{__name__}:ForgetfulDriver"}
    job["tracking"] = {"type": f"{__name__}:RecordingTracker"}
    reporter = ActingReporter()
    assert read_outcome(train_job(job, reporter)) == expected
    assert reporter.reports.count("theta is gone: back to the checkpoint of step 2") == 2
    assert RecordingTracker.steps == [1, 2, 3, 4]

    monkeypatch.setattr(ForgetfulDriver, "most_losses", 9)
    with pytest.raises(LostShardError, match=r"^theta is gone, 3 times since step 2$"):
        train_job(job, name="doomed")
    run = workplace / "runs" / "doomed"
    assert checkpoints.load(run).progress.step == 2
    train_job(job, resume=run, steps=3)
    assert [row["step"] for row in read_outcome(run)[3]] == [1, 2, 3]
