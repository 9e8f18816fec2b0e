"""Trainings as MLflow records them: parameters, one value per step, artifacts, status. A resume continues the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import tree

import distmeta
from distmeta.config.job import Job
from distmeta.errors import InputError, NumericsError
from distmeta.runtime import checkpoint as checkpoints

MLFLOW = {"type": "mlflow"}


def logged_steps(client: Any, run_id: str, name: str) -> list[int]:
    return sorted(metric.step for metric in client.get_metric_history(run_id, name))


def read_run_id(run: Path) -> str:
    return checkpoints.load(run).progress.tracking_ids["mlflow"]


def test_run_and_its_resume_are_one_mlflow_run(client: Any, workplace: Path) -> None:
    run_settings = {"steps": 6, "name": "tracked", "eval_every": 3, "eval_tasks": 5, "checkpoint_every": 3}
    job = Job.parse(tree("maml", run=run_settings, tracking=MLFLOW))
    folder = distmeta.train(job).run
    run_id = read_run_id(folder)
    stored = client.get_run(run_id)
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == "tracked"
    assert stored.data.params["algorithm.inner_lr"] == "0.05"
    assert stored.data.params["run.steps"] == "6"
    for name in ("loss_before", "loss_after", "grad_norm", "tasks_per_second", "seconds_compute"):
        assert logged_steps(client, run_id, name) == list(range(1, 7)), name
    assert logged_steps(client, run_id, "val_loss_after") == [3, 6]
    assert {item.path for item in client.list_artifacts(run_id)} == {"job.yaml", "checkpoint"}

    # as if the process had been killed after step 6 was sent and before it was saved
    (folder / "checkpoints" / "latest").write_text("step-00000003\n")
    distmeta.train(Job.load(folder / "job.yaml", ["run.steps=8"]), resume=folder)
    assert read_run_id(folder) == run_id
    assert logged_steps(client, run_id, "loss_after") == list(range(1, 9))
    assert client.get_run(run_id).info.status == "FINISHED"
    assert len(client.search_runs([stored.info.experiment_id])) == 1


def test_failed_training_is_a_failed_mlflow_run(client: Any, workplace: Path) -> None:
    tasks = {"type": "hard_cases:AllTasksWithNaN"}
    job = tree("maml", tasks=tasks, run={"on_nonfinite": "stop", "name": "bad"}, tracking=MLFLOW)
    with pytest.raises(NumericsError):
        distmeta.train(Job.parse(job))
    run_id = read_run_id(workplace / "runs" / "bad")
    assert client.get_run(run_id).info.status == "FAILED"


def test_nothing_is_written_if_the_address_is_wrong(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://there")
    with pytest.raises(InputError, match="MLFLOW_TRACKING_URI"):
        distmeta.train(Job.parse(tree("maml", tracking=MLFLOW)))
    assert not (workplace / "runs").exists()


def test_resume_sends_what_a_killed_process_did_not_send(client: Any, workplace: Path) -> None:
    """Steps that the checkpoint and the run folder have, but not the store."""
    settings = {"steps": 4, "name": "killed", "eval_every": 2, "eval_tasks": 5}
    folder = distmeta.train(Job.parse(tree("maml", run=settings, tracking=MLFLOW))).run
    run_id = read_run_id(folder)
    job = Job.load(folder / "job.yaml", ["run.steps=7", "tracking.type=none"])
    distmeta.train(job, resume=folder)  # these steps are not sent
    assert logged_steps(client, run_id, "loss_after") == [1, 2, 3, 4]
    distmeta.train(Job.load(folder / "job.yaml", ["run.steps=9", "tracking.type=mlflow"]), resume=folder)
    assert logged_steps(client, run_id, "loss_after") == list(range(1, 10))
    assert logged_steps(client, run_id, "val_loss_after") == [2, 4, 6, 7, 8, 9]


def test_artifacts_are_beside_their_database(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder of a submitted job is deleted after it."""
    (workplace / "kept").mkdir()
    (workplace / "deleted").mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workplace}/kept/mlflow.db")
    monkeypatch.chdir(workplace / "deleted")
    distmeta.train(Job.parse(tree("maml", run={"steps": 1}, tracking=MLFLOW, output="../runs")))
    assert list((workplace / "kept" / "mlartifacts" / "small").glob("*/artifacts/job.yaml"))
    assert not list((workplace / "deleted").iterdir())
