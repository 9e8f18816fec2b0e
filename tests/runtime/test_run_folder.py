"""The run folder: one writer, complete lines, and evaluations that an interruption does not lose."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import tree
from mlflow import MlflowClient
from support.outcomes import read_rows, read_theta, train_job

import distmeta
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.runtime import checkpoint as checkpoints


def read_steps(run: Path) -> list[object]:
    return [row["step"] for row in read_rows(run)]


def without_validation(row: dict[str, object]) -> dict[str, object]:
    """Return a record as it is before its evaluation."""
    return {key: value for key, value in row.items() if not key.startswith("val_")}


def test_half_written_lines_and_later_steps_are_cut_off(workplace: Path) -> None:
    run = train_job(tree("maml"), name="mine", steps=4)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss_after": 1.0}\n{"step": 6, "lo')
    distmeta.train(Job.load(run / "job.yaml", ["run.steps=6"]), resume=run)
    assert read_steps(run) == [1, 2, 3, 4, 5, 6]


def test_resume_from_an_older_checkpoint_deletes_later_ones(workplace: Path) -> None:
    run = train_job(tree("maml"), name="mine", checkpoint_every=1, keep=3)
    expected = read_theta(run)
    older = run / "checkpoints" / "step-00000004"
    distmeta.train(Job.load(run / "job.yaml", ["run.steps=5"]), resume=older)
    assert checkpoints.find(run).name == "step-00000005"
    assert max(path.name for path in (run / "checkpoints").glob("step-*")) == "step-00000005"
    assert read_steps(run) == [1, 2, 3, 4, 5]
    distmeta.train(Job.load(run / "job.yaml", ["run.steps=6"]), resume=run)
    assert read_theta(run) == expected


def test_resume_evaluates_first_if_an_evaluation_is_pending(workplace: Path) -> None:
    """The run was interrupted between step 4 and its evaluation."""
    job = tree("maml", run={"steps": 8, "eval_every": 4, "eval_tasks": 5, "checkpoint_every": 4, "keep": 9})
    uninterrupted = train_job(job)
    rows = read_rows(uninterrupted)
    stored = checkpoints.load(uninterrupted / "checkpoints" / "step-00000004")
    progress = replace(stored.progress, pending=without_validation(rows[3]), best=None, best_step=None)
    run = workplace / "interrupted"
    checkpoints.save(run, replace(stored, progress=progress), keep=3)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    distmeta.train(Job.parse(stored.job), resume=run)
    resumed = read_rows(run)
    assert [row["step"] for row in resumed] == list(range(1, 9))
    assert resumed[3] == rows[3]
    assert resumed[7]["val_loss_after"] == rows[7]["val_loss_after"]


def test_pending_evaluation_of_the_last_step_is_done_once(workplace: Path) -> None:
    run = train_job(tree("maml"), name="mine", eval_every=6, eval_tasks=5)
    stored = checkpoints.load(run)
    record = without_validation(read_rows(run)[-1])
    progress = replace(stored.progress, pending=record, best=None, best_step=None)
    checkpoints.save(run, replace(stored, progress=progress), keep=3)
    job = Job.load(run / "job.yaml")
    for _ in range(2):
        assert distmeta.train(job, resume=run).step == 6
        assert read_steps(run) == [1, 2, 3, 4, 5, 6]
        assert checkpoints.load(run).progress == replace(stored.progress, pending=None)


def test_patience_stops_and_the_best_is_kept(workplace: Path) -> None:
    job = tree(
        "maml",
        outer={"optimizer": "sgd", "lr": 1e-30},
        run={"steps": 50, "eval_every": 1, "eval_tasks": 5, "patience": 3},
    )
    result = distmeta.train(Job.parse(job))
    assert (result.step, result.best_step) == (4, 1)
    assert checkpoints.load(result.run / "checkpoints" / "best").progress.step == 1


def test_run_that_patience_stopped_stays_stopped(workplace: Path) -> None:
    run = {"steps": 50, "eval_every": 1, "eval_tasks": 5, "patience": 2, "name": "patient"}
    job = Job.parse(tree("maml", outer={"optimizer": "sgd", "lr": 1e-30}, run=run))
    assert [distmeta.train(job, resume="auto").step for _ in range(3)] == [3, 3, 3]


def test_second_writer_is_refused(workplace: Path) -> None:
    """The refused process does not touch the run, in MLflow either."""
    run = distmeta.train(Job.parse(tree("maml", run={"name": "mine"}, tracking={"type": "mlflow"}))).run
    job = Job.load(run / "job.yaml", ["run.steps=9"])
    client = MlflowClient("sqlite:///mlflow.db")
    tracked = checkpoints.load(run).progress.tracking_ids["mlflow"]

    class ResumingReporter:
        def begin(self, folder: Path, job: Job, step: int) -> None:
            with pytest.raises(InputError, match="in use by another process"):
                distmeta.train(job, resume=run)
            assert client.get_run(tracked).info.status == "RUNNING"

        def step(self, record: object) -> None: ...
        def report(self, text: str) -> None: ...
        def end(self) -> None: ...

    assert distmeta.train(job, resume=run, reporter=ResumingReporter()).step == 9
    assert read_steps(run) == list(range(1, 10))
