"""Where a training starts: in a new run folder, or from a checkpoint; and what a resume may change in the job."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distmeta.config.job import Job
from distmeta.config.sections import StrategySection
from distmeta.errors import InputError, redact
from distmeta.files import lock_folder
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.remote_copy import (
    fetch_run,
    is_uri,
    join,
    local_folder,
    lock_dir,
    path_in_run,
    read_pointer,
    run_uri,
)
from distmeta.runtime.run_folder import StartingPoint, truncate_metrics

FREE_SECTIONS = {"tracking", "output", "sweep"}
"""A resume may change these sections as it likes."""

FREE_KEYS = {
    "run": {
        "steps",
        "workers",
        "cpus_per_worker",
        "gpus_per_worker",
        "address",
        "start_timeout",
        "shard_timeout",
        "max_shard_failures",
        "name",
    }
}
"""A resume may change these keys of other sections. It may also

- choose another strategy, if both give the theta and state of `driver` to the bit and compress alike,
- change the `changes` of steps to come.

Any other difference would be another job, and is refused.
"""

OPEN_VALUES: dict[str, tuple[Any, ...]] = {
    "run.shards": (None,),
    "outer.schedule.steps": (None,),
    "compute.execution": ("auto", "measure"),
    "compute.chunk": (None,),
    "compute.differentiation": ("auto",),
    "compute.compile": (True,),  # compiles only if every worker can
}
"""Values with which a job lets the run decide. They are no difference: a resume keeps what was decided at step 0."""


def find_starting_point(job: Job, resume: str | Path | None, report: Callable[[str], None]) -> StartingPoint:
    """Decide between a new run and a resumed one. This writes nothing.

    Args:
        resume: a run folder or checkpoint, or its URI; "auto": the folder of `run.name`, if it has a checkpoint.

    Raises:
        InputError: the run folder exists and is not to be resumed, or the checkpoint is another job's or damaged.
    """
    if resume == "auto":
        if job.run.name is None:
            raise InputError("--resume auto: run.name is not set, expected a fixed name: add run.name=NAME")
        folder, uri = _find_places(job, job.run.name)
        if uri is not None and read_pointer(uri, "latest") is not None:
            return _resume(job, uri, report)
        if (folder / "checkpoints" / "latest").exists():
            return _resume(job, folder, report)
        return StartingPoint(folder, job, None, uri)
    if resume is not None:
        return _resume(job, resume, report)
    if job.run.name is None:
        name = f"{job.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        folder, uri = _find_places(job, name)
        return StartingPoint(folder, job, None, uri)
    folder, uri = _find_places(job, job.run.name)
    exists_here = folder.exists() and any(folder.iterdir())
    if exists_here or (uri is not None and read_pointer(uri, "latest") is not None):
        place = redact(uri) if uri else folder
        raise InputError(
            f"run.name: the run folder {place} exists already: resume it with --resume auto, or take another name"
        )
    return StartingPoint(folder, job, None, uri)


def _resume(job: Job, resume: str | Path, report: Callable[[str], None]) -> StartingPoint:
    """Lock the run folder and load its checkpoint."""
    uri = run_uri(str(resume)) if is_uri(resume) else None
    folder = find_run_folder(resume)
    lock = lock_folder(folder, lock_dir(folder, uri))
    try:
        named = Path(resume)
        if is_uri(resume):
            named = folder / path_in_run(str(resume))
        _, checkpoint = checkpoints.load_newest_intact(named, report)
        resumed_job = _merge_jobs(checkpoint.job, job, checkpoint.progress.step)
        if uri is None:
            uri = _find_places(job, folder.name)[1]
        return StartingPoint(folder, resumed_job, checkpoint, uri, lock)
    except BaseException:
        lock.close()
        raise


def _find_places(job: Job, name: str) -> tuple[Path, str | None]:
    """Return the run's folder on this machine and the URI that it is copied to, if the job's output is a URI."""
    if not is_uri(job.output):
        return Path(job.output) / name, None
    if redact(job.output) != job.output:  # the address is logged, tracked and written to job.yaml
        raise InputError(
            f"output: got {redact(job.output)!r} with credentials, expected none: set them in the environment"
        )
    uri = join(job.output, name)
    return local_folder(uri), uri


def find_run_folder(path: str | Path) -> Path:
    """Return the run folder that a path names, or that a checkpoint belongs to. A run behind a URI is fetched.

    Raises:
        InputError: there is no checkpoint, or it is outside a run folder.
    """
    if is_uri(path):
        return fetch_run(str(path))
    named = Path(path)
    if (named / "checkpoints").is_dir():
        return named
    is_latest = named.name == "latest" and named.is_file()
    # the checkpoint that `latest` names may be damaged, but its run is the same
    checkpoint = named if is_latest else checkpoints.find(named)
    if checkpoint.parent.name != "checkpoints":
        checkpoint = checkpoint.resolve()  # a relative path from within the checkpoints folder
    if checkpoint.parent.name != "checkpoints":
        raise InputError(
            f"--resume: {path} is a checkpoint outside a run folder: it can be evaluated, not resumed"
        )
    return checkpoint.parent.parent


def _merge_jobs(stored: Mapping[str, Any], job: Job, step: int) -> Job:
    """Return the stored job, with what a resume may change taken from `job`.

    Raises:
        InputError: `job` differs in anything else.
    """
    asked = job.to_dict()
    merged: dict[str, Any] = {}
    for section, value in stored.items():
        merged[section] = value
        if section in FREE_SECTIONS:
            merged[section] = asked[section]
        elif section == "changes":
            _refuse_past_changes(value, asked[section], step)
            merged[section] = asked[section]
        elif section == "strategy" and _are_equal_strategies(value, job):
            merged[section] = asked[section]
        elif isinstance(value, dict):
            free = FREE_KEYS.get(section, set())
            _refuse_differences(section, value, asked[section], free)
            merged[section] = value | {key: asked[section][key] for key in free}
        else:
            _refuse_differences("", {section: value}, {section: asked[section]}, set())
    return Job.parse(merged)


def _are_equal_strategies(stored: Mapping[str, Any], job: Job) -> bool:
    """Return whether both strategies have the same theta and state to the bit, and compress gradients alike."""
    before = StrategySection.model_validate(dict(stored))
    same_bits = before.part.equals_driver and job.strategy.part.equals_driver
    return same_bits and before.compress == job.strategy.compress


def _refuse_differences(
    section: str, stored: Mapping[str, Any], asked: Mapping[str, Any], free: set[str]
) -> None:
    """Raise InputError at the first difference, except in free keys and open values."""
    for key in {**stored, **asked}:
        old = stored.get(key)
        new = asked.get(key)
        name = f"{section}.{key}".lstrip(".")
        if key in free or new == old or new in OPEN_VALUES.get(name, ()):
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            _refuse_differences(name, old, new, set())
            continue
        raise InputError(
            f"{name}: got {new!r}, but the run to resume has {old!r}: a resume may change run.steps, workers, "
            "placement, tracking and output; anything else is another job"
        )


def _refuse_past_changes(stored: list[Any], asked: list[Any], step: int) -> None:
    """Raise InputError if changes that took effect before `step` differ."""
    past_stored = [change for change in stored if change["step"] < step]
    past_asked = [change for change in asked if change["step"] < step]
    if past_stored != past_asked:
        raise InputError(
            f"changes: got {past_asked} before step {step}, but the run to resume had {past_stored}: "
            "these steps are done, so their changes must stay"
        )


def branch_run(checkpoint: Path, folder: Path) -> None:
    """Make a run folder that continues from another run's checkpoint, with new runs of its trackers.

    It gets the checkpoint, the best one before it, and the metrics of the steps up to it. What was in `folder` is lost.
    """
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "checkpoints").mkdir(parents=True)
    progress = checkpoints.load(checkpoint).progress
    for step in {progress.step, progress.best_step} - {None}:
        source = checkpoint.with_name(f"step-{step:08d}")
        if source.exists():
            shutil.copytree(source, folder / "checkpoints" / source.name)
    shutil.copyfile(checkpoint.parents[1] / "metrics.jsonl", folder / "metrics.jsonl")
    truncate_metrics(folder / "metrics.jsonl", progress.last_recorded_step)
    checkpoints.forget_trackers(folder / "checkpoints" / checkpoint.name)
    checkpoints.rewind(folder, progress.step, progress.best_step)
