"""The run folder, OUTPUT/NAME-ID/: job.yaml, metrics.jsonl, checkpoints/; and what a resume may change."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from distmeta.config.job import Job
from distmeta.config.sections import StrategySection
from distmeta.errors import InputError, redact
from distmeta.files import lock_folder, to_json_value, write_atomically
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.checkpoint import Checkpoint, Progress, SaveError
from distmeta.runtime.remote_copy import (
    Mirror,
    below_run,
    fetch_run,
    is_uri,
    join,
    local_folder,
    lock_place,
    pointed,
    run_of,
)

MAY_CHANGE = {
    "run": {
        "steps", "workers", "cpus_per_worker", "gpus_per_worker", "address", "start_timeout",
        "shard_timeout", "max_shard_failures", "name",
    },
    "tracking": None,
    "output": None,
    "sweep": None,
}  # fmt: skip
"""What a resume may change: steps, workers, placement, tracking, output; and who holds theta, where the bits do not
depend on it. The rest would be another job."""


SETTLED: dict[str, tuple[Any, ...]] = {
    "run.shards": (None,),
    "outer.schedule.steps": (None,),
    "compute.execution": ("auto", "measure"),
    "compute.chunk": (None,),
    "compute.differentiation": ("auto",),
    "compute.compile": (True,),  # on condition that every worker can
}
"""What a job may leave open and the run settled at its start."""


@dataclass(frozen=True)
class Start:
    """Where a training begins."""

    folder: Path
    job: Job
    checkpoint: Checkpoint | None
    """None: from step 0, in a new folder."""
    uri: str | None = None
    """Where the folder is copied to: a run of a job whose output is a URI, or one resumed from a URI."""
    lock: IO[str] | None = None
    """On the folder of a resumed run, from before its checkpoint was read."""

    def close(self) -> None:
        if self.lock is not None:
            self.lock.close()

    @property
    def place(self) -> str:
        """What to name the run by."""
        return self.uri or str(self.folder)


def starting_point(job: Job, resume: str | Path | None, say: Callable[[str], None]) -> Start:
    """Decides between a new run and a resumed one; writes nothing.

    Args:
        resume: a run folder or checkpoint; "auto": the folder that `run.name` fixes, if it has a checkpoint.

    Raises:
        InputError: an existing run folder without resume, another job's checkpoint, a damaged one.
    """
    if resume == "auto":
        if job.run.name is None:
            raise InputError("--resume auto: run.name is not set, expected a fixed name: add run.name=NAME")
        folder, uri = _places(job, job.run.name)
        resume = uri if uri is not None and pointed(uri, "latest") is not None else folder
        if resume is folder and not (folder / "checkpoints" / "latest").exists():
            return Start(folder, job, None, uri)
    if resume is not None:
        uri = run_of(str(resume)) if is_uri(resume) else None
        folder = run_folder(resume)
        lock = lock_folder(folder, lock_place(folder, uri))
        try:
            named = folder / below_run(str(resume)) if is_uri(resume) else Path(resume)
            _, checkpoint = checkpoints.load_whole(named, say)
            resumed = _resumed_job(checkpoint.job, job, checkpoint.progress.step)
            return Start(folder, resumed, checkpoint, uri or _places(job, folder.name)[1], lock)
        except BaseException:
            lock.close()
            raise
    if job.run.name is None:
        name = f"{job.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        folder, uri = _places(job, name)
        return Start(folder, job, None, uri)
    folder, uri = _places(job, job.run.name)
    if (folder.exists() and any(folder.iterdir())) or (
        uri is not None and pointed(uri, "latest") is not None
    ):
        raise InputError(
            f"run.name: the run folder {redact(uri) if uri else folder} exists already: resume it with --resume auto, "
            "or take another name"
        )
    return Start(folder, job, None, uri)


def _places(job: Job, name: str) -> tuple[Path, str | None]:
    """The run's folder on this machine, and the URI that it is copied to."""
    if not is_uri(job.output):
        return Path(job.output) / name, None
    if redact(job.output) != job.output:  # it is logged, tracked and written to job.yaml
        raise InputError(
            f"output: got {redact(job.output)!r} with credentials, expected none: set them in the environment"
        )
    uri = join(job.output, name)
    return local_folder(uri), uri


def run_folder(path: str | Path) -> Path:
    """The run folder that a run, or one of its checkpoints, belongs to; one behind a URI is fetched.

    Raises:
        InputError: no checkpoint, or one outside a run folder.
    """
    if is_uri(path):
        return fetch_run(str(path))
    named = Path(path)
    if (named / "checkpoints").is_dir():
        return named
    # what `latest` names may be damaged: its run is the same
    where = named if named.name == "latest" and named.is_file() else checkpoints.find(named)
    if where.parent.name != "checkpoints":
        where = where.resolve()  # named from within its own folder
    if where.parent.name != "checkpoints":
        raise InputError(
            f"--resume: {path} is a checkpoint outside a run folder: it can be evaluated, not resumed"
        )
    return where.parent.parent


def _resumed_job(stored: Mapping[str, Any], job: Job, step: int) -> Job:
    """The stored job, with what a resume may change taken from `job`; anything else that differs is refused.

    What `job` leaves open (null, auto) is what the run resolved at its start.
    """
    asked = job.to_dict()
    merged: dict[str, Any] = {}
    for section, value in stored.items():
        free = MAY_CHANGE.get(section, set())
        if free is None:
            merged[section] = asked[section]
        elif section == "changes":
            _refuse_past_changes(value, asked[section], step)
            merged[section] = asked[section]
        elif isinstance(value, dict):
            if section == "strategy" and _are_equal_strategies(value, job):
                merged[section] = asked[section]
                continue
            _refuse_changes(section, value, asked[section], free)
            merged[section] = value | {key: asked[section][key] for key in free}
        else:
            _refuse_changes("", {section: value}, {section: asked[section]}, set())
            merged[section] = value
    return Job.parse(merged)


def _are_equal_strategies(stored: Mapping[str, Any], job: Job) -> bool:
    """Return whether both strategies have the same theta and state to the bit, and compress gradients alike."""
    before = StrategySection.model_validate(dict(stored))
    same_bits = before.part.equals_driver and job.strategy.part.equals_driver
    return same_bits and before.compress == job.strategy.compress


def _refuse_changes(prefix: str, stored: Any, asked: Any, free: set[str]) -> None:
    for key in {**stored, **asked}:
        old, new = stored.get(key), asked.get(key)
        name = f"{prefix}.{key}".lstrip(".")
        if key in free or new == old or new in SETTLED.get(name, ()):
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            _refuse_changes(name, old, new, set())
            continue
        raise InputError(
            f"{name}: got {new!r}, but the run to resume has {old!r}: a resume may change run.steps, workers, "
            "placement, tracking and output; anything else is another job"
        )


def _refuse_past_changes(stored: list[Any], asked: list[Any], step: int) -> None:
    """Changes are free in the steps to come: the run so far is the same."""
    past = [[change for change in changes if change["step"] < step] for changes in (stored, asked)]
    if past[0] != past[1]:
        raise InputError(
            f"changes: got {past[1]} before step {step}, but the run to resume had {past[0]}: what is done stays"
        )


class RunFolder:
    """Owns metrics.jsonl: one line a completed step."""

    def __init__(self, start: Start, job: Job):
        """Creates the folder, or takes up an existing one after a checkpoint: what came later is dropped.

        Raises:
            InputError: another process is writing there; the URI that it is copied to cannot be written.
        """
        path, checkpoint, uri = start.folder, start.checkpoint, start.uri
        self.path, self.uri = path, uri
        self._mirror = None if uri is None else Mirror(uri, path)
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        self._lock = start.lock or lock_folder(path, lock_place(path, uri))
        if checkpoint is None and (path / "checkpoints" / "latest").exists():
            raise InputError(f"run.name: the run folder {path} was started by another process meanwhile")
        write_atomically(path / "job.yaml", job.to_yaml())
        checkpoints.clear(path)
        self._metrics = _taken_up(path, checkpoint and checkpoint.progress)
        if failure := self.publish():
            self.close()
            raise InputError(f"output: {failure}")

    def go_back(self, progress: Progress) -> None:
        """Drops what came after a checkpoint, in the midst of a run."""
        self._metrics.close()
        self._metrics = _taken_up(self.path, progress)

    def publish(self) -> str:
        """Copies what is new to the run's URI, if it has one; why that failed, if it did."""
        return "" if self._mirror is None or self._mirror.push() else self._mirror.failure

    def records(self) -> list[dict[str, Any]]:
        """The lines so far: a process that was killed, or a store that was away, may not have got them tracked."""
        text = (self.path / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a line; NaN and infinities become null.

        Raises:
            SaveError: it cannot be written. A part of it may be: a resume cuts it off.
        """
        with self._saving():
            self._metrics.write(json.dumps(to_json_value(dict(record))) + "\n")
            self._metrics.flush()

    def sync(self) -> None:
        """Makes the lines durable, before a checkpoint says that their steps are done."""
        with self._saving():
            self._metrics.flush()
            os.fsync(self._metrics.fileno())

    @contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SaveError(
                f"{self.path / 'metrics.jsonl'}: cannot be written ({error}): make room, then distmeta train --resume "
                f"{self.path}"
            ) from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what a full disk did not take: said by then
            self._metrics.close()
        self._lock.close()


def adopt(checkpoint: Path, folder: Path) -> None:
    """Makes a run folder that goes on from another run's checkpoint: that checkpoint, the best one before it, and the
    steps up to it, for an MLflow run of its own. What was in the folder is lost.
    """
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "checkpoints").mkdir(parents=True)
    progress = checkpoints.load(checkpoint).progress
    for step in {progress.step, progress.best_step} - {None}:
        source = checkpoint.with_name(f"step-{step:08d}")
        if source.exists():
            shutil.copytree(source, folder / "checkpoints" / source.name)
    shutil.copyfile(checkpoint.parents[1] / "metrics.jsonl", folder / "metrics.jsonl")
    _cut_back(folder / "metrics.jsonl", progress.step - (progress.pending is not None))
    checkpoints.untrack(folder / "checkpoints" / checkpoint.name)
    checkpoints.rewind(folder, progress.step, progress.best_step)


def _taken_up(run: Path, progress: Progress | None) -> IO[str]:
    """metrics.jsonl, to go on after a checkpoint's step, or to begin: later checkpoints and lines are dropped."""
    if progress:
        checkpoints.rewind(run, progress.step, progress.best_step)
    metrics = run / "metrics.jsonl"
    _cut_back(metrics, progress.step - (progress.pending is not None) if progress else 0)
    return metrics.open("a", encoding="utf-8")


def _cut_back(metrics: Path, step: int) -> None:
    """Keeps the whole lines of steps up to `step`."""
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # the half-written last line of a killed run
    write_atomically(metrics, "".join(kept))
