"""A sweep in MLflow: one run, with its trials' runs under it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distmeta.config.job import Job
from distmeta.files import write_atomically
from distmeta.sweeps.results import Trial
from distmeta.tracking.mlflow import Status, Tracker, left_running, open_tracker, tag_runs

STATE = "sweep/mlflow.json"


def experiment_of(job: Job) -> str:
    return job.tracking.experiment or job.name


def open_parent(
    job: Job, folder: Path, say: Callable[[str], None], best: Mapping[str, Any] | None = None
) -> Tracker:
    """The sweep's own MLflow run: the one it had, or a new one.

    Args:
        best: the best trial's values, once the sweep has ended: a parameter cannot change in MLflow.
    """
    state = folder / STATE
    known = json.loads(state.read_text(encoding="utf-8"))["run_id"] if state.exists() else None
    params = job.to_dict() if best is None else {"best": best} if best else {}
    tracker = open_tracker(
        job.tracking.type,
        run_name=folder.name,
        experiment=experiment_of(job),
        params=params,
        tags={
            "distmeta.sweep": str(folder),
            "mlflow.loggedArtifacts": json.dumps([{"path": "trials.json", "type": "table"}]),
        },
        run_id=known,
        say=say,
    )
    remember_parent(folder, tracker)
    return tracker


def remember_parent(folder: Path, tracker: Tracker) -> None:
    """Keeps the id, which a slow store may give late."""
    write_atomically(folder / STATE, json.dumps({"run_id": tracker.run_id}))


def tell_mlflow(
    job: Job,
    folder: Path,
    trials: Sequence[Trial],
    best: Trial | None,
    files: Sequence[Path],
    status: Status,
    say: Callable[[str], None],
) -> None:
    """The best values and the files to the parent run; to a trial's run what it could not say when it was stopped."""
    if job.tracking.type == "none":
        return
    found = {} if best is None else {**best.values, "trial": best.name, best.metric: best.value}
    tracker = open_parent(job, folder, say, found)
    left = left_running(tracker.run_id)
    for path in files:
        tracker.log_artifact(path)
    tracker.close(status)
    known = {trial.tracking_id: trial for trial in trials if trial.tracking_id is not None}
    for run_id in left:
        _finish(job, run_id, known.get(run_id), say)
    tag_runs({run_id: _tags(trial) for run_id, trial in known.items()})


def _tags(trial: Trial) -> dict[str, str]:
    return {"distmeta.trial": trial.status} | ({"distmeta.reason": trial.reason} if trial.reason else {})


def _finish(job: Job, run_id: str, trial: Trial | None, say: Callable[[str], None]) -> None:
    """Sends a trial's whole history again, of which MLflow keeps what it lacks, and how it ended.

    Args:
        trial: None: the run of a trial that went on from another's, in another run.
    """
    tracker = open_tracker(
        job.tracking.type,
        run_name="",
        experiment=experiment_of(job),
        params={},
        tags={},
        run_id=run_id,
        say=say,
    )
    if trial is not None and trial.run is not None:
        for line in (trial.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            tracker.log_step(json.loads(line))
    ends: dict[str, Status] = {"failed": "FAILED", "finished": "FINISHED"}
    tracker.close(ends.get(trial.status, "KILLED") if trial is not None else "KILLED")
