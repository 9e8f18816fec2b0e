"""What a person at the terminal sees: a progress bar, or plain lines where there is no terminal. All on stderr."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from distmeta.config.job import Job

PLAIN_SECONDS = 10.0
"""Between two plain lines."""


class Terminal:
    """A `runtime.driver.Reporter`."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._last_line = 0.0
        self._steps = 0

    def begin(self, folder: Path, job: Job, step: int) -> None:
        least, most = job.run.min_workers, job.run.max_workers
        workers = f"{least} to {most} Ray workers" if least < most else f"{most} Ray workers"
        workers = workers if most else "this process"
        after = f", resumed at step {step}" if step else ""
        self.console.print(
            f"[bold]{job.name}[/]: {job.algorithm.type} on {job.tasks.type}, {workers}, "
            f"{job.compute.execution}{after}",
        )
        self.console.print(f"run folder {folder}", soft_wrap=True)
        self._steps = job.run.steps
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task("", total=job.run.steps, completed=step, figures="")
            self._bar.start()

    def step(self, record: Mapping[str, Any]) -> None:
        if "val_loss_after" in record:
            self.say(f"step {record['step']} validation: {figures(record, 'val_')}")
        if self._bar is not None:
            text = f"{figures(record)} {record['tasks_per_second']:.0f} tasks/s"
            self._bar.update(self._task, completed=record["step"], figures=text)
        elif time.monotonic() - self._last_line > PLAIN_SECONDS or record["step"] == self._steps:
            self._last_line = time.monotonic()
            text = f"{figures(record)}, {record['tasks_per_second']:.0f} tasks/s"
            self.say(f"step {record['step']}/{self._steps}: {text}")
        if record["tasks_dropped"]:
            self.say(
                f"step {record['step']}: {record['tasks_dropped']} tasks had a non-finite gradient and were left out"
            )

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class SweepTable:
    """A `sweeps.run.View`: a short table that is refreshed in place, or a line a trial that ended."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._rows: dict[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {}
        self._live: Live | None = None
        self._count = 0

    def begin(self, folder: Path, count: int) -> None:
        self._count = count
        self.say(f"sweep folder {folder}")
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=2, get_renderable=self._table)
            self._live.start()

    def trial(self, name: str, status: str, values: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
        self._rows[name] = (status, values, figures)
        if self._live is None and status != "running":
            ended = sum(row[0] != "running" for row in self._rows.values())
            shown = ", ".join(f"{key} {_short(value)}" for key, value in values.items())
            figure = "" if figures["value"] is None else f": {figures['metric']} {figures['value']:.4f}"
            self.say(
                f"{ended}/{self._count} {name} {status} at step {figures['step'] or 0}{figure} ({shown})"
            )

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False)

    def end(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _table(self) -> Table:
        """Trials that run, and the eight that ended last."""
        running = [item for item in self._rows.items() if item[1][0] == "running"]
        ended = [item for item in self._rows.items() if item[1][0] != "running"]
        keys = list(next(iter(self._rows.values()))[1]) if self._rows else []
        table = Table(title=f"{len(ended)} of {self._count} trials ended", title_justify="left")
        for column in ("trial", "", *keys, "step", "figure"):
            table.add_column(column)
        for name, (status, values, found) in [*ended[-8:], *running]:
            figure = "" if found["value"] is None else f"{found['value']:.4f}"
            table.add_row(
                name, status, *(_short(values[key]) for key in keys), str(found["step"] or 0), figure
            )
        return table


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def figures(record: Mapping[str, Any], prefix: str = "") -> str:
    """`loss 1.234 -> 0.567, accuracy 0.201 -> 0.854`: before and after adaptation."""
    parts = []
    for name in ("loss", "accuracy", "return"):
        after = record.get(f"{prefix}{name}_after")
        before = record.get(f"{prefix}{name}_before")
        if after is not None:
            parts.append(f"{name} {after:.3f}" if before is None else f"{name} {before:.3f} -> {after:.3f}")
    return ", ".join(parts)


def evaluation_table(evaluation: Any) -> Table:
    """Means over the tasks before adaptation and after inner steps, and below each its 95 % interval."""
    table = Table(title=f"{evaluation.tasks} unseen tasks, ± 95 %", title_justify="left", show_lines=True)
    table.add_column("")
    steps = len(next(iter(evaluation.curve.values())))
    shown = sorted({*range(min(steps, 6)), steps - 1})
    for k in shown:
        if steps == 1:
            table.add_column("score", justify="right")
        else:
            table.add_column("before" if k == 0 else f"{k} step" + "s" * (k > 1), justify="right")
    for name, means in evaluation.curve.items():
        spreads = evaluation.curve_ci95[name]
        below = ["" if spreads[k] is None else f"\n± {spreads[k]:.4f}" for k in shown]
        table.add_row(name, *(f"{means[k]:.4f}{text}" for k, text in zip(shown, below, strict=True)))
    return table
