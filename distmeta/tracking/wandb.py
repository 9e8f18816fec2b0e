"""Tracking with Weights & Biases: one run per training. Tested with wandb 0.31, offline.

wandb's own environment variables name the account and the defaults (WANDB_API_KEY, WANDB_ENTITY, WANDB_MODE, …).
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from distmeta.errors import InputError
from distmeta.files import write_atomically
from distmeta.tracking.interface import Status, StepRecord, TrackedRun

LAST_STEP_FILE = "distmeta-last-step.json"
"""In the run's wandb folder. An offline run cannot ask the server how far it was."""
EXIT_CODES: dict[Status, int] = {"FINISHED": 0, "FAILED": 1, "KILLED": 130}
"""wandb shows a run with an exit code other than 0 as failed."""


class WandbTracker:
    """Records a training as a wandb run.

    Args:
        project: the project; null: WANDB_PROJECT, else the job's name.
        entity: the user or team; null: WANDB_ENTITY, else the account's default.
        mode: `online`, `offline` (files in RUN/wandb, for `wandb sync`) or `disabled`; null: WANDB_MODE, else online.
    """

    environment_prefixes = ("WANDB_",)

    def __init__(
        self,
        run: TrackedRun,
        project: str | None = None,
        entity: str | None = None,
        mode: Literal["online", "offline", "disabled"] | None = None,
    ):
        self.run_id = run.run_id
        self.last_step = 0
        self._run = run
        self._project = project or os.environ.get("WANDB_PROJECT") or run.experiment
        self._entity = entity
        self._mode = mode or os.environ.get("WANDB_MODE") or "online"
        self._wandb = import_wandb()
        self._wandb_run: Any = None
        if self._mode == "online" and not self._wandb.login(prompt=False, verify=False):
            raise InputError(
                "tracking: wandb has no API key; run `wandb login`, set WANDB_API_KEY, or use tracking.mode: offline"
            )

    def open(self) -> None:
        """Choose the run's id. The run starts with the first step or file, when the run folder exists."""
        if self.run_id is None:
            self.run_id = secrets.token_hex(4)
        self.last_step = self._read_last_step()

    def log_step(self, record: StepRecord) -> None:
        self.log_steps([record])

    def log_steps(self, records: Sequence[StepRecord]) -> int:
        wandb_run = self._start_run()
        for record in records:
            if record.step > self.last_step:
                values = {**record.values, "_timestamp": record.time}
                wandb_run.log(values, step=record.step, commit=True)
                self.last_step = record.step
        self._write_last_step()
        return len(records)

    def log_artifact(self, path: Path, folder: str) -> None:
        wandb_run = self._start_run()
        name = re.sub(r"[^\w.-]", "-", f"{folder or path.name}-{self.run_id}")
        artifact = self._wandb.Artifact(name, type=folder or "file")
        if path.is_dir():
            for file in sorted(path.rglob("*")):  # `add_dir` prints on stderr, also if silent (wandb 0.31)
                if file.is_file():
                    artifact.add_file(str(file), name=str(file.relative_to(path)))
        else:
            artifact.add_file(str(path))
        wandb_run.log_artifact(artifact)

    def close(self, status: Status) -> None:
        if self._wandb_run is not None:
            self._wandb_run.finish(exit_code=EXIT_CODES[status])

    def _start_run(self) -> Any:
        if self._wandb_run is None:
            self._wandb_run = self._wandb.init(
                id=self.run_id,
                name=self._run.name,
                project=self._project,
                entity=self._entity,
                mode=self._mode,
                dir=str(self._run.folder),
                config={**self._run.params, **self._run.tags},
                allow_val_change=True,  # a resume may change run.steps
                resume="allow" if self._mode == "online" else None,
                settings=self._wandb.Settings(silent=True, console="off"),
            )
            self.last_step = max(self.last_step, self._wandb_run.starting_step - 1)
        return self._wandb_run

    def _last_step_path(self) -> Path:
        return self._run.folder / "wandb" / LAST_STEP_FILE

    def _read_last_step(self) -> int:
        path = self._last_step_path()
        if not path.exists():
            return 0
        return int(json.loads(path.read_text(encoding="utf-8")).get(self.run_id, 0))

    def _write_last_step(self) -> None:
        self._last_step_path().parent.mkdir(exist_ok=True)
        write_atomically(self._last_step_path(), json.dumps({self.run_id: self.last_step}))


def import_wandb() -> Any:
    """Return the module wandb.

    Raises:
        InputError: the package is missing.
    """
    try:
        import wandb
    except ImportError as error:
        raise InputError(
            f"tracking.type: wandb needs a package that is missing ({error}): pip install 'distmeta[wandb]'"
        ) from None
    return wandb
