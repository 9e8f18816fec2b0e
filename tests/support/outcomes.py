"""Train small jobs and read what they leave, for tests that compare runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import distmeta
from distmeta.config.job import Job
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.reporter import SilentReporter


class ActingReporter(SilentReporter):
    """Calls a function after some steps, in the driver's own thread, and keeps the reports."""

    def __init__(self, actions: Mapping[int, Callable[[], Any]] | None = None):
        self.actions = dict(actions or {})
        """What to call, once, after which step."""
        self.reports: list[str] = []

    def step(self, record: Mapping[str, Any]) -> None:
        action = self.actions.pop(record["step"], None)
        if action is not None:
            action()

    def report(self, text: str) -> None:
        self.reports.append(text)


def train_job(
    job: dict[str, Any],
    reporter: SilentReporter | None = None,
    resume: Path | None = None,
    strategy: dict[str, Any] | None = None,
    **run: Any,
) -> Path:
    """Train a job with other values in its `run` section and, if given, another `strategy`. Return its run folder."""
    changed = job | {"run": job["run"] | run}
    if strategy is not None:
        changed["strategy"] = strategy
    return distmeta.train(Job.parse(changed), resume, reporter).run


def read_theta(run: Path | str) -> dict[str, bytes]:
    """Return theta at a run's latest checkpoint, or at a checkpoint, as bytes by name."""
    return {name: value.numpy().tobytes() for name, value in checkpoints.load(run).theta.items()}


def read_rows(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def read_rows_without_times(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without what depends on the clock."""
    return [
        {key: value for key, value in row.items() if not key.startswith(("seconds", "tasks_per"))}
        for row in read_rows(run)
    ]


def read_outcome(run: Path) -> tuple[dict[str, bytes], dict[str, bytes], Any, list[dict[str, Any]]]:
    """Return theta and the optimizer state as bytes, the schedule, and metrics.jsonl without columns of time."""
    checkpoint = checkpoints.load(run)
    moments = {name: value.numpy().tobytes() for name, value in checkpoint.optimizer.items()}
    return read_theta(run), moments, checkpoint.outer, read_rows_without_times(run)
