"""Random faults of every kind on a real cluster: the same theta to the bit, every step counted once, nothing left.

The long ones, by hand: `pytest -m slow tests/chaos/test_chaos.py` (MAML: five times 100 faults over 1,600 steps, in an
hour or two).
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import HOME, tree
from injector import Injector, Nodes, clockless

import distmeta
from distmeta.job import Job
from distmeta.mlflow_store import import_mlflow
from distmeta.runtime import checkpoint as checkpoints

PACE = 0.15
"""Seconds that a draw takes: the run has to outlast the faults."""
EPOCHS = {"type": "maml-rl", "inner_lr": 0.1, "kl": 0.1, "outer_epochs": 3}
GAUSSIAN = {"type": "gaussian", "hidden": [12], "activation": "tanh"}
JOBS = {
    "maml": tree("maml", tasks={"type": "hard_cases:Paced", "seconds": PACE}),
    "policy": tree(EPOCHS, tasks={"type": "paced:PacedNavigation", "seconds": PACE / 2}, model=GAUSSIAN),
    "rl2": tree("rl2", tasks={"type": "paced:PacedBandit", "seconds": PACE}),
}


def bits(run: Path) -> bytes:
    theta = checkpoints.load(run).theta
    return b"".join(name.encode() + theta[name].numpy().tobytes() for name in sorted(theta))


@pytest.mark.parametrize(
    ("name", "seed", "faults", "steps", "size"),
    [
        ("maml", 7, 3, 45, 2),
        # the driver is killed, then the workers
        pytest.param("policy", 41, 2, 16, 1, marks=pytest.mark.slow),
        *(pytest.param(name, 0, 60, 1000, 2, marks=pytest.mark.slow) for name in ("policy", "rl2")),
        *(pytest.param("maml", seed, 100, 1600, 2, marks=pytest.mark.slow) for seed in range(5)),
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
    job = JOBS[name] | {"run": JOBS[name]["run"] | run}
    run = job["run"]
    calm = distmeta.train(Job.parse(job | {"run": run | {"name": "calm"}})).run

    begun = time.monotonic()
    folder = HOME / f"{name}{seed}"
    folder.mkdir()
    nodes = Nodes(folder)
    placed = run | {"workers": {"min": 1, "max": 4}, "address": nodes.address}
    (workplace / "job.yaml").write_text(yaml.safe_dump(job | {"run": placed, "tracking": {"type": "mlflow"}}))
    injector = None
    try:
        for _ in range(size):
            nodes.add()
        injector = Injector(nodes, workplace / "runs" / "shaken", seed)
        for _ in range(faults):
            injector.until(min(injector.steps() + 2, steps))
            injector.harm()
        injector.finish()
    finally:
        if injector is not None:
            injector.close()
            print(*injector.log, f"{time.monotonic() - begun:.0f} s", sep="\n")
        nodes.close()
    shaken = workplace / "runs" / "shaken"
    assert sum(step < steps for step, _ in injector.log) >= 0.7 * faults, "too many met a run that was done"
    assert bits(shaken) == bits(calm)
    assert clockless(shaken) == clockless(calm)
    assert not [path for path in injector.shared if path.exists()]

    import_mlflow()
    from mlflow.tracking import MlflowClient

    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    run_id = checkpoints.load(shaken).progress.tracking_id
    assert [
        m.step for m in sorted(client.get_metric_history(run_id, "loss_after"), key=lambda m: m.step)
    ] == list(range(1, steps + 1))
