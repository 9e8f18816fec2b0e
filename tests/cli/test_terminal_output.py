"""What progress and tables show without a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import tree
from rich.console import Console

from distmeta.cli.progress import TerminalReporter, describe_workers, format_scores
from distmeta.cli.tables import SweepTable, build_evaluation_table
from distmeta.config.job import Job
from distmeta.evaluation.evaluate import Evaluation


@pytest.mark.parametrize(
    ("workers", "expected"),
    [
        (0, "this process"),
        (1, "1 Ray worker"),
        (3, "3 Ray workers"),
        ({"min": 1, "max": 4}, "1 to 4 Ray workers"),
    ],
)
def test_number_of_workers(workers: Any, expected: str) -> None:
    assert describe_workers(Job.parse(tree(run={"workers": workers}))) == expected


def test_scores_before_and_after_adaptation() -> None:
    record = {"loss_before": 1.2345, "loss_after": 0.5, "accuracy_before": None, "accuracy_after": 0.25}
    assert format_scores(record) == "loss 1.234 -> 0.500, accuracy 0.250"
    assert format_scores({"val_loss_after": 2.0}, "val_") == "loss 2.000"


def test_progress_has_a_line_for_the_first_and_last_step(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = TerminalReporter()
    reporter.begin(Path("runs/a"), Job.parse(tree(run={"steps": 3})), 0)
    for step in (1, 2, 3):
        dropped = 2 if step == 2 else 0
        reporter.step({"step": step, "loss_after": 1.0, "tasks_per_second": 80.0, "tasks_dropped": dropped})
    reporter.end()
    assert capsys.readouterr().err.splitlines() == [
        "small: maml on sinusoid, this process, auto",
        "run folder runs/a",
        "step 1/3: loss 1.000, 80 tasks/s",
        "step 2: 2 tasks had a non-finite gradient and were left out",
        "step 3/3: loss 1.000, 80 tasks/s",
    ]


def test_sweep_has_a_line_per_trial_that_ended(capsys: pytest.CaptureFixture[str]) -> None:
    table = SweepTable()
    table.begin(Path("runs/s"), 2)
    values = {"outer.lr": 0.0123456, "run.seed": 3}
    table.trial("00000", "running", values, {"metric": "val_loss_after", "value": None, "step": None})
    table.trial("00000", "finished", values, {"metric": "val_loss_after", "value": 0.5, "step": 20})
    table.trial("00001", "failed", values, {"metric": "val_loss_after", "value": None, "step": None})
    table.end()
    assert capsys.readouterr().err.splitlines() == [
        "sweep folder runs/s",
        "1/2 00000 finished at step 20: val_loss_after 0.5000 (outer.lr 0.0123, run.seed 3)",
        "2/2 00001 failed at step 0 (outer.lr 0.0123, run.seed 3)",
    ]


def test_evaluation_table_has_the_first_steps_and_the_last() -> None:
    curve = [1.0 - k / 10 for k in range(9)]
    intervals: list[float | None] = [0.01] * 8 + [None]
    evaluation = Evaluation(30, {}, None, "loss_after", {"loss": curve}, {"loss": intervals})
    console = Console(width=120)
    with console.capture() as capture:
        console.print(build_evaluation_table(evaluation))
    text = capture.get()
    assert "30 unseen tasks, ± 95 %" in text
    for column in ("before", "1 step", "2 steps", "5 steps", "8 steps"):
        assert column in text
    assert "7 steps" not in text
    assert "1.0000" in text
    assert "± 0.0100" in text
