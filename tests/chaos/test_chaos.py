"""Random faults of every kind on a real cluster: the same theta to the bit, every step counted once, nothing left.

The long ones, by hand: `pytest -m slow tests/chaos/test_chaos.py` (505 faults over 5,020 steps, in an hour or two:
MAML three times, meta-RL, every strategy; `async` and `all-reduce` promise no bits, but the calm run's last losses).
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import HOME, tree
from injector import Injector, Nodes, clockless

import distmeta
from distmeta.config.job import Job
from distmeta.runtime import checkpoint as checkpoints
from distmeta.tracking.mlflow import import_mlflow

PACE = 0.15
"""Seconds that a draw takes: the run has to outlast the faults."""
EPOCHS = {"type": "maml-rl", "inner_lr": 0.1, "kl": 0.1, "outer_epochs": 3}
GAUSSIAN = {"type": "gaussian", "hidden": [12], "activation": "tanh"}
JOBS = {
    "maml": tree("maml", tasks={"type": "hard_cases:Paced", "seconds": PACE}),
    "policy": tree(EPOCHS, tasks={"type": "paced:PacedNavigation", "seconds": PACE / 2}, model=GAUSSIAN),
    "rl2": tree("rl2", tasks={"type": "paced:PacedBandit", "seconds": PACE}),
}
STRATEGIES: dict[str, dict[str, Any]] = {
    "sharded": {"servers": 2},
    "local": {"replicas": 2, "local_steps": 4, "checkpoint_every": 4},
    "async": {"max_staleness": 2},
    "all-reduce": {},
}
LOOSE = {"async", "all-reduce"}
"""Without a promise of bits."""


def job_of(name: str, run: dict[str, Any]) -> dict[str, Any]:
    """A job of JOBS, or MAML with a strategy of STRATEGIES."""
    strategy = {"strategy": name, **STRATEGIES[name]} if name in STRATEGIES else {}
    job = JOBS["maml" if strategy else name]
    if name == "sharded":  # two servers own at least a block each
        job = job | {"model": job["model"] | {"hidden": [300, 300]}}
    return job | {"run": job["run"] | run | strategy}


def calm_of(job: dict[str, Any]) -> dict[str, Any]:
    """The same without a fault and, where only workers can do it, combined by `driver`."""
    run = job["run"] | {"name": "calm"}
    if run.get("strategy") not in (None, "local"):
        run = {key: value for key, value in run.items() if key not in ("servers", "max_staleness")}
        run["strategy"] = "driver"
    return job | {"run": run}


def bits(run: Path) -> bytes:
    theta = checkpoints.load(run).theta
    return b"".join(name.encode() + theta[name].numpy().tobytes() for name in sorted(theta))


def last_losses(rows: list[dict[str, Any]]) -> float:
    """The mean over the last fifth of the steps."""
    return statistics.fmean(row["loss_after"] for row in rows[-len(rows) // 5 :])


@pytest.mark.parametrize(
    ("name", "seed", "faults", "steps", "size"),
    [
        # the driver is killed, then the workers
        ("maml", 41, 2, 16, 1),
        pytest.param("policy", 41, 2, 16, 1, marks=pytest.mark.slow),
        pytest.param("maml", 7, 3, 45, 2, marks=pytest.mark.slow),
        *(pytest.param(name, 0, 60, 500, 2, marks=pytest.mark.slow) for name in ("policy", "rl2")),
        *(pytest.param("maml", seed, 100, 1000, 2, marks=pytest.mark.slow) for seed in range(3)),
        pytest.param("sharded", 0, 25, 250, 2, marks=pytest.mark.slow),
        pytest.param("local", 0, 25, 400, 2, marks=pytest.mark.slow),
        pytest.param("async", 0, 25, 250, 2, marks=pytest.mark.slow),
        pytest.param("all-reduce", 0, 10, 120, 2, marks=pytest.mark.slow),
    ],
)
def test_chaos(
    name: str,
    seed: int,
    faults: int,
    steps: int,
    size: int,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workplace}/mlflow.db")
    run: dict[str, Any] = {
        "steps": steps, "eval_every": 20, "eval_tasks": 30, "checkpoint_every": 3, "keep": 3, "name": "shaken",
        "start_timeout": 200.0, "shard_timeout": 40.0, "max_shard_failures": 12,
    }  # fmt: skip
    job = job_of(name, run)
    calm = distmeta.train(Job.parse(calm_of(job))).run

    begun = time.monotonic()
    folder = HOME / f"{name}{seed}"
    folder.mkdir()
    nodes = Nodes(folder)
    # an elastic group waits three minutes for what Ray Train (2.60) had kept for that of a killed driver
    workers = 2 if name == "all-reduce" else {"min": 1, "max": 4}
    placed = job["run"] | {"workers": workers, "address": nodes.address}
    (workplace / "job.yaml").write_text(yaml.safe_dump(job | {"run": placed, "tracking": {"type": "mlflow"}}))
    injector = None
    try:
        for _ in range(size):
            nodes.add()
        injector = Injector(nodes, workplace / "runs" / "shaken", seed)
        for _ in range(faults):
            injector.until(min(injector.steps() + 2, steps))
            if injector.steps() == steps:
                break
            injector.harm()
        injector.finish()
    finally:
        if injector is not None:
            injector.close()
            print(*injector.log, f"{time.monotonic() - begun:.0f} s", sep="\n")
        nodes.close()
    shaken = workplace / "runs" / "shaken"
    assert len(injector.log) >= 0.7 * faults, "the run was done too soon"
    if name in LOOSE:
        rows, calm_rows = clockless(shaken), clockless(calm)
        assert [row["step"] for row in rows] == list(range(1, steps + 1))
        assert last_losses(rows) == pytest.approx(last_losses(calm_rows), rel=0.1)
    else:
        assert bits(shaken) == bits(calm)
        assert clockless(shaken) == clockless(calm)
    assert not [path for path in injector.shared if path.exists()]

    import_mlflow()
    from mlflow.tracking import MlflowClient

    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    run_id = checkpoints.load(shaken).progress.tracking_ids["mlflow"]
    assert [
        m.step for m in sorted(client.get_metric_history(run_id, "loss_after"), key=lambda m: m.step)
    ] == list(range(1, steps + 1))
