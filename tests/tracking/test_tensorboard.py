"""The TensorBoard tracker, read back with TensorBoard's own reader."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import tree

import distmeta
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.runtime import checkpoint as checkpoints
from distmeta.tracking.interface import StepRecord, TrackedRun
from distmeta.tracking.tensorboard import TensorBoardTracker


def make_job(**options: Any) -> dict[str, Any]:
    settings = {"steps": 6, "name": "board", "eval_every": 3, "eval_tasks": 5, "checkpoint_every": 3}
    return tree("maml", run=settings) | {"tracking": {"type": "tensorboard", **options}}


def read_steps(folder: Path) -> dict[str, list[int]]:
    """Return the steps of each scalar in all event files of a folder, in the order of the files."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    steps: dict[str, list[int]] = {}
    for path in sorted(folder.glob("events.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                steps.setdefault(value.tag, []).append(event.step)
    return steps


def test_every_step_is_there_once_also_after_a_resume(workplace: Path) -> None:
    run = distmeta.train(Job.parse(make_job())).run
    steps = read_steps(run / "tensorboard")
    assert steps["loss_after"] == [1, 2, 3, 4, 5, 6]
    assert steps["val_loss_after"] == [3, 6]
    assert "job/text_summary" in steps
    assert checkpoints.load(run).progress.tracking_ids == {"tensorboard": "tensorboard"}

    # as if the process had been killed after step 6 was written and before it was saved
    (run / "checkpoints" / "latest").write_text("step-00000003\n")
    distmeta.train(Job.load(run / "job.yaml", ["run.steps=8"]), resume=run)
    steps = read_steps(run / "tensorboard")
    assert sorted(steps["loss_after"]) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_runs_with_the_same_name_share_the_chosen_folder(workplace: Path) -> None:
    first = distmeta.train(Job.parse(make_job(folder="boards")))
    distmeta.train(Job.load(first.run / "job.yaml", ["run.steps=7"]), resume=first.run)
    assert read_steps(Path("boards/board"))["loss_after"] == [1, 2, 3, 4, 5, 6, 7]
    other = make_job(folder="boards") | {"output": "elsewhere"}
    distmeta.train(Job.parse(other))  # another run with the same name
    assert read_steps(Path("boards/board-2"))["loss_after"] == [1, 2, 3, 4, 5, 6]
    assert len(read_steps(Path("boards/board"))["loss_after"]) == 7


def test_a_truncated_event_file_counts_up_to_the_cut(tmp_path: Path) -> None:
    run = TrackedRun(name="a", folder=tmp_path, report=print)
    tracker = TensorBoardTracker(run)
    tracker.open()
    for step in (1, 2, 3):
        tracker.log_step(StepRecord(step, 1e9, {"loss": 1.0}))
    tracker.close("KILLED")
    (path,) = (tmp_path / "tensorboard").glob("events.*")
    path.write_bytes(path.read_bytes()[:-5])
    again = TensorBoardTracker(run)
    again.open()
    assert again.last_step == 2


def test_missing_package_is_one_line_that_names_the_extra(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        InputError, match=r"^tracking\.type: tensorboard .*pip install 'distmeta\[tensorboard\]'$"
    ):
        distmeta.train(Job.parse(make_job()))
    assert not Path("runs").exists()
