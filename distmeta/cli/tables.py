"""Tables on the terminal: the trials of a sweep (stderr) and the scores of an evaluation (stdout)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.live import Live
from rich.table import Table

if TYPE_CHECKING:
    from distmeta.evaluation.evaluate import Evaluation

ENDED_TRIALS = 8
"""Rows of the sweep table for trials that have ended. All running trials are shown."""
FIRST_STEPS = 6
"""Columns of the evaluation table for the first inner steps. The last step is always shown."""


class TrialRow(NamedTuple):
    """What the sweep table knows about one trial."""

    status: str
    values: Mapping[str, Any]  # of the searched keys
    last: Mapping[str, Any]  # metric, value and step of its last evaluation


class SweepTable:
    """A `sweeps.view.View` for people: a table that is refreshed in place, or one line per trial that ended."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._rows: dict[str, TrialRow] = {}
        self._live: Live | None = None
        self._count = 0

    def begin(self, folder: Path, count: int) -> None:
        self._count = count
        self.report(f"sweep folder {folder}")
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=2, get_renderable=self._build_table)
            self._live.start()

    def trial(self, name: str, status: str, values: Mapping[str, Any], last: Mapping[str, Any]) -> None:
        row = TrialRow(status, values, last)
        self._rows[name] = row
        if self._live is None and status != "running":
            self._report_end(name, row)

    def report(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False)

    def end(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _report_end(self, name: str, row: TrialRow) -> None:
        ended = sum(other.status != "running" for other in self._rows.values())
        values = ", ".join(f"{key} {_format(value)}" for key, value in row.values.items())
        step = row.last["step"] or 0
        score = ""
        if row.last["value"] is not None:
            score = f": {row.last['metric']} {row.last['value']:.4f}"
        self.report(f"{ended}/{self._count} {name} {row.status} at step {step}{score} ({values})")

    def _build_table(self) -> Table:
        """Build the table of the trials that ended last and of those that are running."""
        running = [item for item in self._rows.items() if item[1].status == "running"]
        ended = [item for item in self._rows.items() if item[1].status != "running"]
        keys = list(next(iter(self._rows.values())).values) if self._rows else []
        table = Table(title=f"{len(ended)} of {self._count} trials ended", title_justify="left")
        for column in ("trial", "", *keys, "step", "value"):
            table.add_column(column)
        for name, row in [*ended[-ENDED_TRIALS:], *running]:
            values = [_format(row.values[key]) for key in keys]
            step = str(row.last["step"] or 0)
            score = "" if row.last["value"] is None else f"{row.last['value']:.4f}"
            table.add_row(name, row.status, *values, step, score)
        return table


def _format(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def build_evaluation_table(evaluation: Evaluation) -> Table:
    """Build a table of the mean scores before adaptation and after inner steps, each with its 95 % interval."""
    unseen = "" if evaluation.seen_classes else "unseen "
    table = Table(title=f"{evaluation.tasks} {unseen}tasks, ± 95 %", title_justify="left", show_lines=True)
    table.add_column("")
    count = len(next(iter(evaluation.curve.values())))
    steps = sorted({*range(min(count, FIRST_STEPS)), count - 1})
    for step in steps:
        table.add_column("score" if count == 1 else _name_step(step), justify="right")
    for name, means in evaluation.curve.items():
        intervals = evaluation.curve_ci95[name]
        table.add_row(name, *(_format_score(means[step], intervals[step]) for step in steps))
    return table


def _name_step(step: int) -> str:
    if step == 0:
        return "before"
    return "1 step" if step == 1 else f"{step} steps"


def _format_score(mean: float, interval: float | None) -> str:
    text = f"{mean:.4f}"
    return text if interval is None else f"{text}\n± {interval:.4f}"
