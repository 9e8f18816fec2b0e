"""Tracking with TensorBoard: event files, by default in the run folder (`tensorboard --logdir runs` shows all runs).

Tested with tensorboard 2.21. Files that distmeta offers (the job, the last checkpoint) stay in the run folder only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distmeta.errors import InputError
from distmeta.tracking.interface import Status, StepRecord, TrackedRun

SUBFOLDER = "tensorboard"


class TensorBoardTracker:
    """Writes TensorBoard event files.

    Args:
        folder: where to write, in a subfolder with the run's name; null: in the run folder, `RUN/tensorboard`.
    """

    def __init__(self, run: TrackedRun, folder: str | None = None):
        self.run_id = run.run_id
        self.last_step = 0
        self._run = run
        self._folder = folder
        self._writer: Any = None
        import_tensorboard()

    def open(self) -> None:
        """Find the last step. The files are written from the first `log_step` on, when the run folder exists."""
        if self.run_id is None:
            self.run_id = self._choose_name()
        self.last_step = read_last_step(self._events_folder())

    def log_step(self, record: StepRecord) -> None:
        writer = self._open_writer()
        for name, value in record.values.items():
            writer.add_scalar(name, value, record.step, walltime=record.time)

    def log_artifact(self, path: Path, folder: str) -> None:
        """Do nothing: TensorBoard keeps no files."""

    def close(self, status: Status) -> None:
        if self._writer is not None:
            self._writer.close()

    def _choose_name(self) -> str:
        """Return the name of a new run's event folder. A name that another run has used gets a number."""
        if self._folder is None:
            return SUBFOLDER
        name = self._run.name
        count = 1
        while (Path(self._folder) / name).exists():
            count += 1
            name = f"{self._run.name}-{count}"
        return name

    def _events_folder(self) -> Path:
        assert self.run_id is not None
        parent = self._run.folder if self._folder is None else Path(self._folder)
        return parent / self.run_id

    def _open_writer(self) -> Any:
        if self._writer is None:
            summary_writer = import_tensorboard()
            self._writer = summary_writer(str(self._events_folder()), flush_secs=5)
            job = json.dumps(self._run.params, indent=2)
            self._writer.add_text("job", f"```json\n{job}\n```")
        return self._writer


def import_tensorboard() -> Any:
    """Return torch's SummaryWriter.

    Raises:
        InputError: the package is missing.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            f"tracking.type: tensorboard needs a package that is missing ({error}): pip install 'distmeta[tensorboard]'"
        ) from None
    return SummaryWriter


def read_last_step(folder: Path) -> int:
    """Return the last step in a folder's event files; 0 if there is none."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    last_step = 0
    for path in folder.glob("events.out.tfevents.*"):
        for event in EventFileLoader(str(path)).Load():
            last_step = max(last_step, event.step)
    return last_step
