"""A training as MLflow sees it: parameters, one value a step, artifacts, status; a resume goes on in the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import tree

import distmeta
import distmeta.protocols
from distmeta.config.job import Job
from distmeta.errors import NumericsError
from distmeta.runtime import checkpoint as checkpoints

TRACKED = {"type": "mlflow"}


def steps_of(client: Any, run_id: str, name: str) -> list[int]:
    return sorted(metric.step for metric in client.get_metric_history(run_id, name))


def test_a_run_and_its_resume(client: Any, workplace: Path) -> None:
    run_settings = {"steps": 6, "name": "tracked", "eval_every": 3, "eval_tasks": 5, "checkpoint_every": 3}
    job = Job.parse(tree("maml", run=run_settings, tracking=TRACKED))
    folder = distmeta.train(job).run
    run_id = checkpoints.load(folder).progress.tracking_ids["mlflow"]
    stored = client.get_run(run_id)
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == "tracked"
    assert stored.data.params["algorithm.inner_lr"] == "0.05"
    assert stored.data.params["run.steps"] == "6"
    for name in ("loss_before", "loss_after", "grad_norm", "tasks_per_second", "seconds_compute"):
        assert steps_of(client, run_id, name) == list(range(1, 7)), name
    assert steps_of(client, run_id, "val_loss_after") == [3, 6]
    assert {item.path for item in client.list_artifacts(run_id)} == {"job.yaml", "checkpoint"}

    # as if it had been killed after step 6 was sent and before it was saved
    (folder / "checkpoints" / "latest").write_text("step-00000003\n")
    distmeta.train(Job.load(folder / "job.yaml", ["run.steps=8"]), resume=folder)
    assert checkpoints.load(folder).progress.tracking_ids["mlflow"] == run_id
    assert steps_of(client, run_id, "loss_after") == list(range(1, 9))
    assert client.get_run(run_id).info.status == "FINISHED"
    assert len(client.search_runs([stored.info.experiment_id])) == 1


def test_a_failed_run_is_marked_so(client: Any, workplace: Path) -> None:
    tasks = {"type": "hard_cases:AllBad"}
    job = tree("maml", tasks=tasks, run={"on_nonfinite": "stop", "name": "bad"}, tracking=TRACKED)
    with pytest.raises(NumericsError):
        distmeta.train(Job.parse(job))
    run_id = checkpoints.load(workplace / "runs" / "bad").progress.tracking_ids["mlflow"]
    assert client.get_run(run_id).info.status == "FAILED"


def test_a_wrong_address_writes_nothing(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://there")
    with pytest.raises(distmeta.errors.InputError, match="MLFLOW_TRACKING_URI"):
        distmeta.train(Job.parse(tree("maml", tracking=TRACKED)))
    assert not (workplace / "runs").exists()


def test_what_a_killed_process_had_not_sent_yet_is_sent_by_the_resume(client: Any, workplace: Path) -> None:
    """Steps that a checkpoint has, and the run folder, but not the store."""
    settings = {"steps": 4, "name": "killed", "eval_every": 2, "eval_tasks": 5}
    folder = distmeta.train(Job.parse(tree("maml", run=settings, tracking=TRACKED))).run
    run_id = checkpoints.load(folder).progress.tracking_ids["mlflow"]
    more = Job.load(folder / "job.yaml", ["run.steps=7"])
    untold = more.with_values({"tracking.type": "none"})
    distmeta.train(untold, resume=folder)  # as if it had never been delivered
    assert steps_of(client, run_id, "loss_after") == [1, 2, 3, 4]
    distmeta.train(Job.load(folder / "job.yaml", ["run.steps=9", "tracking.type=mlflow"]), resume=folder)
    assert steps_of(client, run_id, "loss_after") == list(range(1, 10))
    assert steps_of(client, run_id, "val_loss_after") == [2, 4, 6, 7, 8, 9]


def test_artifacts_lie_beside_their_database(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A submitted job's working folder goes after it."""
    (workplace / "kept").mkdir()
    (workplace / "gone").mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workplace}/kept/mlflow.db")
    monkeypatch.chdir(workplace / "gone")
    distmeta.train(Job.parse(tree("maml", run={"steps": 1}, tracking={"type": "mlflow"}, output="../runs")))
    assert list((workplace / "kept" / "mlartifacts" / "small").glob("*/artifacts/job.yaml"))
    assert not list((workplace / "gone").iterdir())
