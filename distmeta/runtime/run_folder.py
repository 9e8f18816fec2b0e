"""The run folder, OUTPUT/NAME-ID/: job.yaml, metrics.jsonl, checkpoints/."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.files import lock_folder, to_json_value, write_atomically
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.checkpoint import Checkpoint, Progress, SaveError
from distmeta.runtime.remote_copy import RemoteCopy, lock_dir


@dataclass(frozen=True)
class StartingPoint:
    """Where a training begins (`resume.find_starting_point`)."""

    folder: Path
    """The run folder on this machine."""
    job: Job
    checkpoint: Checkpoint | None
    """None: a new run, from step 0."""
    uri: str | None = None
    """Where the folder is copied to, if the job's output is a URI or the run is resumed from one."""
    lock: IO[str] | None = None
    """The lock on the folder of a resumed run. It is taken before the checkpoint is read."""

    def close(self) -> None:
        if self.lock is not None:
            self.lock.close()

    @property
    def place(self) -> str:
        """How to refer to the run: its URI, else its folder."""
        return self.uri or str(self.folder)


class RunFolder:
    """Writes metrics.jsonl, one line per completed step, and keeps the copy behind a URI up to date."""

    def __init__(self, start: StartingPoint, job: Job):
        """Create the folder. If it exists, continue it after the checkpoint: later checkpoints and lines are deleted.

        Raises:
            InputError: another process writes to the folder, or the URI that it is copied to cannot be written.
        """
        self.path = start.folder
        self.uri = start.uri
        self._copy = None if start.uri is None else RemoteCopy(start.uri, start.folder)
        (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        self._lock = start.lock or lock_folder(self.path, lock_dir(self.path, start.uri))
        if start.checkpoint is None and (self.path / "checkpoints" / "latest").exists():
            raise InputError(f"run.name: another process has just started the run folder {self.path}")
        write_atomically(self.path / "job.yaml", job.to_yaml())
        checkpoints.clear(self.path)
        self._metrics = self._open_metrics(start.checkpoint.progress if start.checkpoint else None)
        failure = self.publish()
        if failure:
            self.close()
            raise InputError(f"output: {failure}")

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl. NaN and infinities become null.

        Raises:
            SaveError: it cannot be written. If a part of it was, a resume cuts that off.
        """
        try:
            line = json.dumps(record, allow_nan=False)
        except ValueError:
            line = json.dumps(to_json_value(dict(record)))
        with self._reporting_failures():
            self._metrics.write(line + "\n")
            self._metrics.flush()

    def flush(self) -> None:
        """Make the lines durable. This comes before a checkpoint that says that their steps are done."""
        with self._reporting_failures():
            self._metrics.flush()
            os.fsync(self._metrics.fileno())

    def publish(self) -> str:
        """Copy what is new to the run's URI, if it has one. Return why that failed; empty if it did not."""
        if self._copy is None or self._copy.update():
            return ""
        return self._copy.failure

    def records(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl. Trackers may lack some of them after a crash or a network failure."""
        text = (self.path / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def rewind(self, progress: Progress) -> None:
        """Return to a checkpoint in the middle of a run: delete later checkpoints and lines."""
        self._metrics.close()
        self._metrics = self._open_metrics(progress)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # if a disk is full, the failed write was reported before
            self._metrics.close()
        self._lock.close()

    def _open_metrics(self, progress: Progress | None) -> IO[str]:
        """Open metrics.jsonl to continue after a checkpoint, or to begin. Delete later checkpoints and lines."""
        last_step = 0
        if progress is not None:
            checkpoints.rewind(self.path, progress.step, progress.best_step)
            last_step = progress.last_recorded_step
        metrics = self.path / "metrics.jsonl"
        truncate_metrics(metrics, last_step)
        return metrics.open("a", encoding="utf-8")

    @contextmanager
    def _reporting_failures(self) -> Iterator[None]:
        """Raise SaveError, with the remedy, if the file system fails."""
        try:
            yield
        except OSError as error:
            raise SaveError(
                f"{self.path / 'metrics.jsonl'}: cannot be written ({error}): make room, then distmeta train --resume "
                f"{self.path}"
            ) from error


def truncate_metrics(metrics: Path, last_step: int) -> None:
    """Keep only the complete lines of steps up to `last_step`."""
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # the half-written last line of a killed run
    write_atomically(metrics, "".join(kept))
