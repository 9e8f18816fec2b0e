"""One trial: the ordinary training of a job with a point's values, told to Tune at its evaluations.

A trial's checkpoint, for Tune, is the name of a run folder and a step: the checkpoints themselves stay in the run
folders, which lie in the sweep's folder, beside Tune's own. On several nodes that folder is shared, as Tune's must be.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from ray import tune

from distmeta.config.job import Job
from distmeta.errors import InputError, NumericsError
from distmeta.files import FolderInUseError
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.checkpoint import SaveError
from distmeta.runtime.failure_policy import LostShardError
from distmeta.runtime.interruption import InterruptedRun, StopRequested
from distmeta.runtime.resume import branch_run
from distmeta.runtime.scores import find_primary_metric
from distmeta.runtime.training import SilentReporter, train

POINTER = "run.json"
SCORE, STEP, RUN = "score", "step", "run"
"""What a report to Tune holds: the figure, more being better; the step; the run folder."""


@dataclass(frozen=True)
class TrialSpec:
    """What all trials share."""

    job: dict[str, Any]
    """Theirs but for the point's values."""
    folder: str
    """The sweep's."""
    working: str
    """The working folder of `distmeta sweep`: its relative paths and modules are the trials'."""
    environment: dict[str, str]
    metric: str | None
    mode: str | None
    changing: bool
    """The values may be perturbed in flight: their history goes into the trial's job as `changes`."""


class Pointer(NamedTuple):
    """A checkpoint as Tune keeps it."""

    run: Path
    step: int

    @property
    def checkpoint(self) -> Path:
        return self.run / "checkpoints" / f"step-{self.step:08d}"


def name_of(trial_id: str) -> str:
    """The name of a trial's run folder: trial-00003 for Tune's 1a2b3_00003; TPE's ids are random and have no number."""
    return f"trial-{trial_id.rpartition('_')[2]}"


def run_trial(config: Mapping[str, Any], spec: TrialSpec) -> None:
    """Trains one trial; Tune calls it in an actor of its own, again after a pause or where the actor was lost.

    A training that fails ends the trial here, with its reason in a file: Tune would try an error again, and the same
    numbers would come to the same end.

    Raises:
        LostShardError, SaveError, OSError, FolderInUseError: what may go better elsewhere or later.
    """
    os.environ |= spec.environment | {"TUNE_FUNCTION_THREAD_TIMEOUT_S": "60"}  # to save and say how it ended
    os.chdir(spec.working)
    if spec.working not in sys.path:
        sys.path.insert(0, spec.working)
    name = name_of(tune.get_context().get_trial_id() or "")
    try:
        _train(dict(config["values"]), name, spec)
    except (InterruptedRun, StopRequested):
        sys.exit(0)  # as Tune ends a thread that it has stopped
    except (LostShardError, SaveError, OSError, FolderInUseError):
        raise  # lost workers, a full disk, a predecessor not gone yet: Tune tries again
    except Exception as error:  # whatever a user's parts may raise
        text = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        failure_file(spec.folder, name).write_text(text, encoding="utf-8")


def failure_file(folder: str | Path, name: str) -> Path:
    """Why a trial failed: one line, then the traceback."""
    return Path(folder) / "trials" / f"{name}.failed.txt"


def _train(values: dict[str, Any], name: str, spec: TrialSpec) -> None:
    pointer = _pointer()
    trials = Path(spec.folder) / "trials"
    if pointer is None:
        job, folder, resume = first_job(spec, values, name), trials / name, "auto"  # it may have begun
    else:
        own = pointer.run.name.removeprefix(name)[:1] in ("", "-")
        job, folder = Job.parse(checkpoints.load(pointer.run if own else pointer.checkpoint).job), pointer.run
        now = job.at(pointer.step)
        perturbed = {key: value for key, value in values.items() if value != now.value(key)}
        if perturbed or not own:  # on from another trial's, in a run folder and an MLflow run of its own
            change = [{"step": pointer.step, "set": perturbed}] if perturbed else []
            changes = [*job.to_dict()["changes"], *change]
            folder = folder_of(trials, f"{name}-{pointer.step}", changes)
            branch_run(pointer.checkpoint, folder)
            job = job.with_values({"run.name": folder.name}, changes=changes)
        resume = folder
    report = Report(spec, folder, job.run.steps)
    for row in _evaluations(folder, pointer.step if pointer else 0):
        report.step(row)  # computed before Tune's last note of it: it need not be again
    train(job, resume, report)
    if report.stopped:
        sys.exit(0)


def folder_of(trials: Path, name: str, changes: list[dict[str, Any]]) -> Path:
    """Where a trial goes on from another's checkpoint: a run folder, and an MLflow run, for each history of values. The
    same one again where its worker was lost; another where a slow trial's checkpoint is gone on from a second time.
    """
    folder = trials / name
    numbers = count(2)
    while (job := folder / "job.yaml").exists() and Job.load(job).to_dict()["changes"] != changes:
        folder = trials / f"{name}-{next(numbers)}"
    return folder


def first_job(spec: TrialSpec, values: Mapping[str, Any], name: str) -> Job:
    """A trial's job at its first step."""
    changes = [{"step": 0, "set": values}] if spec.changing else []
    return Job.parse(spec.job).with_values({**values, "run.name": name}, changes=changes)


def _pointer() -> Pointer | None:
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        stored = json.loads((Path(folder) / POINTER).read_text(encoding="utf-8"))
    return Pointer(Path(stored[RUN]), int(stored[STEP]))


def _evaluations(folder: Path, after: int) -> Iterator[dict[str, Any]]:
    """The evaluations that a run folder has, past a step and up to its latest checkpoint."""
    if not (folder / "checkpoints" / "latest").exists():
        return
    last = checkpoints.load(folder).progress.step
    for row in evaluations_of(folder):
        if after < row["step"] <= last:
            yield row


def evaluations_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl that have validation figures."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return [row for row in rows if "val_loss_after" in row]


def figure_of(row: Mapping[str, Any], metric: str | None, mode: str | None) -> tuple[str, float, int]:
    """The metric's name, its value at an evaluation, and whether more of it is better (1) or worse (−1).

    Raises:
        NumericsError: it is not finite.
        InputError: the tasks have no such metric.
    """
    name, sign = find_primary_metric(row, "val_") if metric is None else (metric, -1 if "loss" in metric else 1)
    sign = {"min": -1, "max": 1, None: sign}[mode]
    if name not in row:
        known = ", ".join(sorted(key for key in row if key.startswith("val_")))
        raise InputError(f"sweep.metric: got {name!r}, but evaluations have {known}")
    if row[name] is None:
        raise NumericsError(f"{name} is not finite at step {row['step']}")
    return name, float(row[name]), sign


class Report(SilentReporter):
    """A reporter that tells Tune of evaluations, and ends the training that Tune stops."""

    def __init__(self, spec: TrialSpec, folder: Path, steps: int):
        self.stopped = False
        self._spec, self._folder, self._steps = spec, folder, steps
        self._began = time.monotonic()

    def step(self, record: Mapping[str, Any]) -> None:
        if "val_loss_after" not in record:
            return
        name, value, sign = figure_of(record, self._spec.metric, self._spec.mode)
        pointer = {RUN: str(self._folder), STEP: record["step"]}
        figures = {SCORE: sign * value, "metric": name, "value": value, **pointer}
        try:
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / POINTER).write_text(json.dumps(pointer), encoding="utf-8")
                tune.report(figures, checkpoint=tune.Checkpoint.from_directory(folder))
        except SystemExit:  # how Tune stops a training
            self.stopped = True
            if record["step"] < self._steps:
                raise StopRequested from None
