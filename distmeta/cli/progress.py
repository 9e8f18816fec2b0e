"""What the terminal shows during training: a progress bar, or a line every few seconds. Everything goes to stderr."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from distmeta.config.job import Job
from distmeta.runtime.ray_workers import describe_number

LINE_SECONDS = 10.0
"""Shortest time between two lines about steps, if stderr is not a terminal."""


class TerminalReporter:
    """A `runtime.reporter.Reporter` for people."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._bar_task = TaskID(0)
        self._total_steps = 0
        self._last_line = 0.0  # time.monotonic()

    def begin(self, folder: Path, job: Job, step: int) -> None:
        resumed = f", resumed at step {step}" if step else ""
        self.console.print(
            f"[bold]{job.name}[/]: {job.algorithm.type} on {job.tasks.type}, {describe_workers(job)}, "
            f"{job.compute.execution}{resumed}",
        )
        self.console.print(f"run folder {folder}", soft_wrap=True)
        self._total_steps = job.run.steps
        if self.console.is_terminal:
            self._start_bar(step)

    def step(self, record: Mapping[str, Any]) -> None:
        step = record["step"]
        if "val_loss_after" in record:
            self.report(f"step {step} validation: {format_scores(record, 'val_')}")
        scores = format_scores(record)
        speed = f"{record['tasks_per_second']:.0f} tasks/s"
        if self._bar is not None:
            self._bar.update(self._bar_task, completed=step, scores=f"{scores} {speed}")
        elif step == self._total_steps or time.monotonic() - self._last_line > LINE_SECONDS:
            self._last_line = time.monotonic()
            self.report(f"step {step}/{self._total_steps}: {scores}, {speed}")
        if record["tasks_dropped"]:
            self.report(
                f"step {step}: {record['tasks_dropped']} tasks had a non-finite gradient and were left out"
            )

    def report(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _start_bar(self, step: int) -> None:
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[scores]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._bar_task = self._bar.add_task("", total=self._total_steps, completed=step, scores="")
        self._bar.start()


def describe_workers(job: Job) -> str:
    """Return `this process`, `1 Ray worker`, `2 Ray workers` or `2 to 4 Ray workers`."""
    if not job.run.max_workers:
        return "this process"
    return describe_number(job.run.min_workers, job.run.max_workers, "Ray worker")


def format_scores(record: Mapping[str, Any], prefix: str = "") -> str:
    """Return the scores before and after adaptation: `loss 1.234 -> 0.567, accuracy 0.201 -> 0.854`."""
    scores = []
    for name in ("loss", "accuracy", "return"):
        before = record.get(f"{prefix}{name}_before")
        after = record.get(f"{prefix}{name}_after")
        if after is None:
            continue
        change = f"{after:.3f}" if before is None else f"{before:.3f} -> {after:.3f}"
        scores.append(f"{name} {change}")
    return ", ".join(scores)
