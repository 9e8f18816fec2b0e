"""One trial: a normal training of the job with some values from the space. It reports its evaluations to Tune.

The checkpoint that Tune keeps is only the name of a run folder and a step. The checkpoints themselves stay in the run
folders, which are in the sweep's folder. On several nodes this folder must be shared, as Tune's must be.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Mapping
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
from distmeta.runtime.reporter import SilentReporter
from distmeta.runtime.resume import branch_run
from distmeta.runtime.scores import find_primary_metric
from distmeta.runtime.training import train

POINTER_FILE = "run.json"
"""The file in Tune's checkpoint."""

# Keys of a report to Tune
SCORE = "score"
"""The metric with the sign that makes more better."""
STEP = "step"
RUN = "run"
"""The run folder."""


@dataclass(frozen=True)
class TrialSpec:
    """What all trials of a sweep share."""

    job: dict[str, Any]
    """The job without the trial's own values."""
    folder: str
    """The sweep's folder."""
    working_dir: str
    """Where `distmeta sweep` was started. The job's relative paths and modules are found from there."""
    environment: dict[str, str]
    """Variables that the trackers read."""
    metric: str | None
    """`sweep.metric`."""
    mode: str | None
    """`sweep.mode`."""
    values_change: bool
    """Whether values change during a trial (population-based training). The trial's job then lists the changes."""


class CheckpointPointer(NamedTuple):
    """A checkpoint as Tune keeps it."""

    run: Path
    """The run folder."""
    step: int

    @property
    def checkpoint(self) -> Path:
        return self.run / "checkpoints" / f"step-{self.step:08d}"


class Score(NamedTuple):
    """The metric by which trials are compared, at one evaluation."""

    metric: str
    value: float
    sign: int
    """1: more is better; -1: less is better."""


class TrialStart(NamedTuple):
    """What a trial trains, and what it continues from."""

    job: Job
    folder: Path
    """The run folder."""
    resume: str | Path
    reported_step: int
    """The last step that Tune knows."""


def trial_name(trial_id: str) -> str:
    """Return the name of a trial's run folder: trial-00003 for Tune's id 1a2b3_00003.

    TPE's ids are random and have no number.
    """
    return f"trial-{trial_id.rpartition('_')[2]}"


def failure_path(folder: str | Path, name: str) -> Path:
    """Return the file that says why a trial failed: one line, then the traceback."""
    return Path(folder) / "trials" / f"{name}.failed.txt"


def run_trial(config: Mapping[str, Any], spec: TrialSpec) -> None:
    """Train one trial. Tune calls this in an actor, and again after a pause or if the actor was lost.

    A training that fails ends the trial here and leaves the reason in a file. Tune would try again, and the same
    numbers would fail the same way.

    Raises:
        LostShardError, SaveError, OSError, FolderInUseError: it may succeed elsewhere or later.
    """
    os.environ |= spec.environment
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "60"  # time to save and to close the trackers
    os.chdir(spec.working_dir)
    if spec.working_dir not in sys.path:
        sys.path.insert(0, spec.working_dir)
    name = trial_name(tune.get_context().get_trial_id() or "")
    try:
        train_trial(dict(config["values"]), name, spec)
    except (InterruptedRun, StopRequested):
        sys.exit(0)  # as Tune ends a thread that it has stopped
    except (LostShardError, SaveError, OSError, FolderInUseError):
        raise  # lost workers, a full disk, a predecessor that has not ended yet: Tune tries again
    except Exception as error:  # a user's parts may raise anything
        text = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        failure_path(spec.folder, name).write_text(text, encoding="utf-8")


def train_trial(values: dict[str, Any], name: str, spec: TrialSpec) -> None:
    """Train from where the trial is, and report every evaluation that Tune does not know."""
    pointer = read_pointer()
    if pointer is None:
        folder = Path(spec.folder) / "trials" / name
        first_job = build_first_job(spec, values, name)
        start = TrialStart(first_job, folder, "auto", 0)  # "auto": it may have begun already
    else:
        start = continue_from(pointer, values, name, spec)
    reporter = TuneReporter(spec, start.folder, start.job.run.steps)
    for row in read_unreported_evaluations(start.folder, start.reported_step):
        reporter.step(row)
    train(start.job, start.resume, reporter)
    if reporter.is_stopped:
        sys.exit(0)


def build_first_job(spec: TrialSpec, values: Mapping[str, Any], name: str) -> Job:
    """Return a trial's job at its first step."""
    changes = [{"step": 0, "set": values}] if spec.values_change else []
    return Job.parse(spec.job).with_values({**values, "run.name": name}, changes=changes)


def continue_from(
    pointer: CheckpointPointer, values: Mapping[str, Any], name: str, spec: TrialSpec
) -> TrialStart:
    """Return how to continue from a checkpoint.

    If the values have changed, or the checkpoint is another trial's (population-based training), the trial continues in
    a new run folder, and in new runs of its trackers.
    """
    is_own = pointer.run.name.removeprefix(name)[:1] in ("", "-")
    source = pointer.run if is_own else pointer.checkpoint
    job = Job.parse(checkpoints.load(source).job)
    job_now = job.at(pointer.step)
    changed = {key: value for key, value in values.items() if value != job_now.value(key)}
    if is_own and not changed:
        return TrialStart(job, pointer.run, pointer.run, pointer.step)
    changes = list(job.to_dict()["changes"])
    if changed:
        changes.append({"step": pointer.step, "set": changed})
    folder = choose_folder(Path(spec.folder) / "trials", f"{name}-{pointer.step}", changes)
    branch_run(pointer.checkpoint, folder)
    job = job.with_values({"run.name": folder.name}, changes=changes)
    return TrialStart(job, folder, folder, pointer.step)


def choose_folder(trials: Path, name: str, changes: list[dict[str, Any]]) -> Path:
    """Return the run folder of a trial that continues with changed values: one folder per history of values.

    It is the same folder again if the trial's worker was lost. It is another one if the trial continues from the same
    checkpoint of a slower trial a second time.
    """
    folder = trials / name
    numbers = count(2)
    while (job := folder / "job.yaml").exists() and Job.load(job).to_dict()["changes"] != changes:
        folder = trials / f"{name}-{next(numbers)}"
    return folder


def read_pointer() -> CheckpointPointer | None:
    """Return the checkpoint that Tune wants the trial to continue from; None at its start."""
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        stored = json.loads((Path(folder) / POINTER_FILE).read_text(encoding="utf-8"))
    return CheckpointPointer(Path(stored[RUN]), int(stored[STEP]))


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl that have validation metrics."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.endswith("}")]  # the last line may be cut off
    return [row for row in rows if "val_loss_after" in row]


def read_unreported_evaluations(folder: Path, reported_step: int) -> list[dict[str, Any]]:
    """Return a run's evaluations after a step and up to its latest checkpoint.

    They were computed before the trial's process was lost, and are not computed again.
    """
    if not (folder / "checkpoints" / "latest").exists():
        return []
    saved_step = checkpoints.load(folder).progress.step
    return [row for row in read_evaluations(folder) if reported_step < row["step"] <= saved_step]


def find_score(row: Mapping[str, Any], metric: str | None, mode: str | None) -> Score:
    """Return the score of an evaluation.

    Args:
        metric: `sweep.metric`; None: the primary metric of the tasks.
        mode: `sweep.mode`; None: less is better for a loss, else more.

    Raises:
        NumericsError: it is not finite.
        InputError: the tasks have no such metric.
    """
    if metric is None:
        name, sign = find_primary_metric(row, "val_")
    else:
        name = metric
        sign = -1 if "loss" in metric else 1
    if mode is not None:
        sign = {"min": -1, "max": 1}[mode]
    if name not in row:
        known = ", ".join(sorted(key for key in row if key.startswith("val_")))
        raise InputError(f"sweep.metric: got {name!r}, but evaluations have {known}")
    if row[name] is None:
        raise NumericsError(f"{name} is not finite at step {row['step']}")
    return Score(name, float(row[name]), sign)


class TuneReporter(SilentReporter):
    """Reports the evaluations of a training to Tune, and ends the training if Tune stops the trial."""

    def __init__(self, spec: TrialSpec, folder: Path, steps: int):
        self.is_stopped = False
        self._spec = spec
        self._folder = folder
        self._steps = steps

    def step(self, record: Mapping[str, Any]) -> None:
        if "val_loss_after" not in record:
            return
        score = find_score(record, self._spec.metric, self._spec.mode)
        pointer = {RUN: str(self._folder), STEP: record["step"]}
        report = {SCORE: score.sign * score.value, "metric": score.metric, "value": score.value, **pointer}
        try:
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / POINTER_FILE).write_text(json.dumps(pointer), encoding="utf-8")
                tune.report(report, checkpoint=tune.Checkpoint.from_directory(folder))
        except SystemExit:  # how Tune stops a training
            self.is_stopped = True
            if record["step"] < self._steps:
                raise StopRequested from None
