"""Small sweeps, and what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conftest import tree

from distmeta.runtime import checkpoint as checkpoints

RUN = {"steps": 6, "eval_every": 2, "eval_tasks": 5, "name": "swept"}
RATES = {"algorithm.inner_lr": {"loguniform": [0.01, 0.2]}, "outer.lr": {"loguniform": [1e-3, 0.05]}}
TRACKED = {"type": "mlflow", "experiment": "sweeps"}


def swept(run: dict[str, Any] | None = None, tracked: bool = False, **sweep: Any) -> dict[str, Any]:
    section = {"space": RATES, "trials": 3, "scheduler": {"type": "none"}, **sweep}
    return tree(
        "maml", run=RUN | (run or {}), sweep=section, tracking=TRACKED if tracked else {"type": "none"}
    )


def bits(run: Path) -> list[bytes]:
    theta = checkpoints.load(run).theta
    return [theta[name].numpy().tobytes() for name in sorted(theta)]


def evaluations(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["val_loss_after"] for row in rows if "val_loss_after" in row}


def runs_of(client: Any) -> tuple[Any, dict[str, Any]]:
    """The parent run, and the children by name."""
    experiment = client.get_experiment_by_name("sweeps").experiment_id
    runs = client.search_runs([experiment])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = {run.info.run_name: run for run in runs if run is not parent}
    assert len(children) == len(runs) - 1, "a trial has two runs"
    assert {run.data.tags["mlflow.parentRunId"] for run in children.values()} == {parent.info.run_id}
    return parent, children
