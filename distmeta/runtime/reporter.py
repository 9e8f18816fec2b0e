"""Who is told how a run goes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from distmeta.config.job import Job


class Reporter(Protocol):
    """Is told how a run goes. The loop calls it in the main thread, except `report`, which any thread may call."""

    def begin(self, folder: Path, job: Job, step: int) -> None:
        """Called before the first step, with the run folder, the resolved job and the completed steps."""
        ...

    def step(self, record: Mapping[str, Any]) -> None:
        """Called after every step with its line of metrics.jsonl, when everything about it is saved."""
        ...

    def report(self, text: str) -> None:
        """Show a line to the user."""
        ...

    def end(self) -> None:
        """Called at the end, also after an error."""
        ...


class SilentReporter:
    """A reporter that shows nothing."""

    def begin(self, folder: Path, job: Job, step: int) -> None: ...
    def step(self, record: Mapping[str, Any]) -> None: ...
    def report(self, text: str) -> None: ...
    def end(self) -> None: ...
