"""Small sweeps, and what tests read of their results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import tree
from support.outcomes import read_rows

RUN = {"steps": 6, "eval_every": 2, "eval_tasks": 5, "name": "swept"}
RATES = {"algorithm.inner_lr": {"loguniform": [0.01, 0.2]}, "outer.lr": {"loguniform": [1e-3, 0.05]}}
EXPERIMENT = "sweeps"


def make_sweep(run: dict[str, Any] | None = None, tracked: bool = False, **sweep: Any) -> dict[str, Any]:
    """Return a small job with a sweep of three trials over two rates.

    Args:
        run: further values of the `run` section.
        tracked: whether MLflow tracks it.
        sweep: further values of the `sweep` section.
    """
    section = {"space": RATES, "trials": 3, "scheduler": {"type": "none"}, **sweep}
    tracking = {"type": "mlflow", "experiment": EXPERIMENT} if tracked else {"type": "none"}
    return tree("maml", run=RUN | (run or {}), sweep=section, tracking=tracking)


def read_losses(run: Path) -> dict[int, float]:
    """Return a run's validation losses by step."""
    return {row["step"]: row["val_loss_after"] for row in read_rows(run) if "val_loss_after" in row}


def read_mlflow_runs(client: Any) -> tuple[Any, dict[str, Any]]:
    """Return the sweep's MLflow run and its trials' runs by name. Assert that no trial has two."""
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    runs = client.search_runs([experiment])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = {run.info.run_name: run for run in runs if run is not parent}
    assert len(children) == len(runs) - 1, "a trial has two runs"
    assert {run.data.tags["mlflow.parentRunId"] for run in children.values()} == {parent.info.run_id}
    return parent, children
