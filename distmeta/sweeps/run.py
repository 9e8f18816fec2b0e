"""A sweep from its job to its best trial: the folder, the search, the sweep's runs in trackers, and the results.

FOLDER/job.yaml              the job with its sweep, as it was resolved at the start
FOLDER/trials/trial-00003/   the run folders of the trials
FOLDER/sweep/best.yaml       the job of the best trial; trials.parquet, trials.json, curves.png, values.png
FOLDER/tune/                 Tune's own state. It is pickled: resume only sweeps that you would run as code.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.files import write_atomically
from distmeta.runtime.interruption import InterruptedRun
from distmeta.runtime.startup import resolve_job
from distmeta.sweeps import NothingFoundError
from distmeta.sweeps.results import (
    TrialResult,
    build_best_job,
    collect_trials,
    draw_figures,
    find_best,
    write_table,
)
from distmeta.sweeps.tracking import finish_tracking, open_sweep_run, save_ids
from distmeta.sweeps.tuner import build_tuner, join_ray, treat_sigterm_as_sigint
from distmeta.sweeps.view import SilentView, View
from distmeta.tracking.interface import Status
from distmeta.tracking.trackers import Trackers

TUNE_FOLDER = "tune"
"""Tune's folder within the sweep's."""


@dataclass(frozen=True)
class SweepSummary:
    """What a sweep leaves behind."""

    folder: Path
    """The sweep's folder."""
    best_run: Path
    """The best trial's run folder."""
    best: dict[str, Any]
    """The best trial's values."""
    value: float
    """Its best value of the metric."""
    metric: str
    trials: list[TrialResult]


def sweep(job: Job | str | Path, resume: str | Path | None = None, view: View | None = None) -> SweepSummary:
    """Search the space of a job's `sweep:` section. Afterwards FOLDER/sweep/best.yaml is ready to train.

    Args:
        resume: a sweep's folder. Finished trials are kept; the others continue from their checkpoints.
        view: shows how the sweep goes.

    Raises:
        InputError: the job has no sweep, the cluster has no room for one trial, or the folder is another job's. Nothing
            was written.
        InterruptedRun: Ctrl-C or SIGTERM. What was found so far is written, and the sweep can be resumed.
        NothingFoundError: no trial reached an evaluation.
    """
    job = job if isinstance(job, Job) else Job.load(job)
    if job.sweep is None:
        raise InputError("sweep: the job has no such section, expected one with a space")
    view = view or SilentView()
    folder = _choose_folder(job) if resume is None else _find_folder(Path(resume).absolute(), job)
    with ExitStack() as stack:
        room = join_ray(job, stack)
        if resume is None:
            job = resolve_sweep_job(job, view.report)
            _write_job(folder, job)
        else:
            job = Job.load(folder / "job.yaml")
        section = job.sweep
        assert section is not None  # the resolved job has the section, too
        sweep_run = open_sweep_run(job, folder, view.report)
        stack.callback(sweep_run.close, "FAILED")  # does nothing if the status is set before
        view.begin(folder, section.count)
        stack.callback(view.end)
        tuner = build_tuner(job, section, folder / TUNE_FOLDER, sweep_run.ids, view, resume is not None, room)
        with treat_sigterm_as_sigint():
            results = tuner.fit()
        trials = collect_trials(results, folder, job)
        has_ended = len(trials) == section.count and all(trial.status != "unfinished" for trial in trials)
        if sum(trial.steps for trial in trials) >= (section.budget or math.inf):
            has_ended = True
            trials = [_mark_stopped(trial) for trial in trials]
        view.end()
        return _conclude(job, folder, trials, sweep_run, has_ended, view.report)


def _mark_stopped(trial: TrialResult) -> TrialResult:
    """Return a trial that the budget has stopped if it was unfinished."""
    return trial._replace(status="stopped") if trial.status == "unfinished" else trial


def _choose_folder(job: Job) -> Path:
    """Return the folder of a new sweep.

    Raises:
        InputError: it exists and is not empty, or the output is a URI.
    """
    if "://" in job.output:
        raise InputError(f"output: got {job.output!r}, expected a folder (that all nodes see) for a sweep")
    name = job.run.name or f"{job.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    folder = Path(job.output).absolute() / name
    if folder.exists() and any(folder.iterdir()):
        raise InputError(
            f"run.name: the folder {folder} exists already: resume it with --resume {folder}, or choose another name"
        )
    return folder


def _find_folder(folder: Path, job: Job) -> Path:
    """Return the folder of a sweep to resume. What the sweep resolved at its start may be open in the job.

    Raises:
        InputError: it is not a sweep's folder, or it is another job's.
    """
    path = folder / "job.yaml"
    if not (folder / TUNE_FOLDER).is_dir() or not path.is_file():
        raise InputError(f"--resume: {folder} is not a sweep's folder")
    stored = Job.load(path)
    old = _flatten(stored.to_dict())
    new = _flatten(_take_resolved(job, stored).to_dict())
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            raise InputError(
                f"{key}: got {new.get(key)}, but the sweep to resume has {old.get(key)}: use the sweep's own job, or "
                "start a new sweep"
            )
    return folder


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the values of a job as JSON texts by dotted key."""
    values: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            values |= _flatten(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = json.dumps(value)
    return values


def resolve_sweep_job(job: Job, report: Callable[[str], None]) -> Job:
    """Decide what all trials must share: what `execution: measure` finds, and the length of the schedule.

    This also builds the job's parts, so that a missing one shows before anything is written. Only the trials compute;
    this process needs a GPU only to measure on it.
    """
    import torch

    device = None if job.compute.execution == "measure" else torch.device("cpu")
    return _take_resolved(job, resolve_job(job, report, device).job)


def _take_resolved(job: Job, resolved: Job) -> Job:
    """Return the job with those values of the resolved job that all trials share."""
    outer: dict[str, Any] = {}
    compute: dict[str, Any] = {}
    if job.trial_steps < job.run.steps:
        length = job.outer.schedule.steps or resolved.outer.schedule.steps
        outer = {"schedule": job.outer.schedule.model_dump() | {"steps": length}}
    if job.compute.execution == "measure":
        compute = {"execution": resolved.compute.execution, "chunk": resolved.compute.chunk}
    return job.replace(compute=compute, outer=outer)


def _write_job(folder: Path, job: Job) -> None:
    for part in ("trials", "sweep", TUNE_FOLDER):
        (folder / part).mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "job.yaml", job.to_yaml())


def _conclude(
    job: Job,
    folder: Path,
    trials: Sequence[TrialResult],
    sweep_run: Trackers,
    has_ended: bool,
    report: Callable[[str], None],
) -> SweepSummary:
    """Write the results to the sweep's folder and to its trackers.

    Raises:
        InterruptedRun: the sweep has not ended.
        NothingFoundError: no trial reached an evaluation.
    """
    best = find_best(trials)
    files = _write_results(job, folder, trials, best)
    status: Status = "FINISHED"
    if not has_ended:
        status = "KILLED"
    elif best is None:
        status = "FAILED"
    sweep_run.close(status)
    save_ids(folder, sweep_run)
    finish_tracking(job, folder, trials, best if has_ended else None, files, status, report)
    if not has_ended:
        raise InterruptedRun(str(folder), sum(trial.steps for trial in trials))
    if best is None or best.run is None or best.value is None:
        reasons = sorted({trial.reason for trial in trials if trial.reason})
        raise NothingFoundError(
            f"no trial reached an evaluation: {reasons[0] if reasons else 'none was started'}"
        )
    return SweepSummary(folder, best.run, best.values, best.value, best.metric, list(trials))


def _write_results(
    job: Job, folder: Path, trials: Sequence[TrialResult], best: TrialResult | None
) -> list[Path]:
    """Write the table, the best job and the figures. Return all files that the sweep's runs in trackers get."""
    place = folder / "sweep"
    write_table(trials, place / "trials.parquet")
    files = [place / "trials.parquet", place / "trials.json", folder / "job.yaml"]
    if best is not None:
        header = f"# {best.metric} {best.value:.4f} at step {best.best_step}: {best.name} of {folder.name}\n"
        text = header + build_best_job(best, job).to_yaml()
        (place / "best.yaml").write_text(text, encoding="utf-8")
        files += [place / "best.yaml", *draw_figures(trials, job, place)]
    return files
