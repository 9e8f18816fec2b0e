"""Random faults of every kind on a real cluster: the same theta to the bit, every step counted once, nothing left over.

The long ones are run by hand: `pytest -m slow tests/chaos/test_chaos.py` (505 faults over 5,020 steps, in one or two
hours: MAML three times, meta-RL, every strategy). `async` and `all-reduce` do not promise bits; their last losses are
compared with those of the undisturbed run.
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
from injector import Injector, RayNodes
from support.outcomes import read_rows_without_times, read_theta

import distmeta
from distmeta.config.job import Job
from distmeta.runtime import checkpoint as checkpoints
from distmeta.tracking.mlflow import import_mlflow

PACE_SECONDS = 0.15
"""Duration of a draw: the run has to last longer than the faults."""
EPOCHS = {"type": "maml-rl", "inner_lr": 0.1, "kl": 0.1, "outer_epochs": 3}
GAUSSIAN = {"type": "gaussian", "hidden": [12], "activation": "tanh"}
NAVIGATION = {"type": "paced:PacedNavigation", "seconds": PACE_SECONDS / 2}
JOBS = {
    "maml": tree("maml", tasks={"type": "hard_cases:SlowTasksOnWorkers", "seconds": PACE_SECONDS}),
    "policy": tree(EPOCHS, tasks=NAVIGATION, model=GAUSSIAN),
    "rl2": tree("rl2", tasks={"type": "paced:PacedBandit", "seconds": PACE_SECONDS}),
}
STRATEGIES: dict[str, dict[str, Any]] = {
    "sharded": {"type": "sharded", "servers": 2},
    "local": {"type": "local", "replicas": 2, "local_steps": 4},
    "async": {"type": "async", "max_staleness": 2},
    "all-reduce": {"type": "all-reduce"},
}
WITHOUT_BITS = {"async", "all-reduce"}
"""Strategies whose bits depend on timing."""


def make_job(name: str, run: dict[str, Any]) -> dict[str, Any]:
    """Return a job of JOBS, or MAML with a strategy of STRATEGIES."""
    if name not in STRATEGIES:
        return JOBS[name] | {"run": JOBS[name]["run"] | run}
    job = JOBS["maml"] | {"run": JOBS["maml"]["run"] | run, "strategy": STRATEGIES[name]}
    if name == "local":
        job["run"]["checkpoint_every"] = 4
    if name == "sharded":  # each of the two servers owns at least one block
        job["model"] = job["model"] | {"hidden": [300, 300]}
    return job


def make_undisturbed(job: dict[str, Any]) -> dict[str, Any]:
    """Return the same job in this process. Strategies that need workers are replaced by `driver`."""
    undisturbed = job | {"run": job["run"] | {"name": "undisturbed"}}
    if undisturbed.get("strategy", {}).get("type") != "local":
        undisturbed["strategy"] = {"type": "driver"}
    return undisturbed


def mean_last_loss(rows: list[dict[str, Any]]) -> float:
    """Return the mean loss over the last fifth of the steps."""
    return statistics.fmean(row["loss_after"] for row in rows[-len(rows) // 5 :])


@pytest.mark.parametrize(
    ("name", "seed", "faults", "steps", "nodes"),
    [
        # the driver is killed, then workers
        *(pytest.param(name, 41, 2, 16, 1, marks=pytest.mark.slow) for name in ("maml", "policy")),
        pytest.param("maml", 7, 3, 45, 2, marks=pytest.mark.slow),
        *(pytest.param(name, 0, 60, 500, 2, marks=pytest.mark.slow) for name in ("policy", "rl2")),
        *(pytest.param("maml", seed, 100, 1000, 2, marks=pytest.mark.slow) for seed in range(3)),
        pytest.param("sharded", 0, 25, 250, 2, marks=pytest.mark.slow),
        pytest.param("local", 0, 25, 400, 2, marks=pytest.mark.slow),
        pytest.param("async", 0, 25, 250, 2, marks=pytest.mark.slow),
        pytest.param("all-reduce", 0, 10, 120, 2, marks=pytest.mark.slow),
    ],
)
def test_random_faults_do_not_change_the_result(
    name: str,
    seed: int,
    faults: int,
    steps: int,
    nodes: int,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workplace}/mlflow.db")
    run_section: dict[str, Any] = {
        "steps": steps,
        "eval_every": 20,
        "eval_tasks": 30,
        "checkpoint_every": 3,
        "keep": 3,
        "name": "disturbed",
        "start_timeout": 200.0,
        "shard_timeout": 40.0,
        "max_shard_failures": 12,
    }
    job = make_job(name, run_section)
    undisturbed = distmeta.train(Job.parse(make_undisturbed(job))).run

    started = time.monotonic()
    folder = HOME / f"{name}{seed}"
    folder.mkdir()
    cluster = RayNodes(folder)
    # an elastic group would wait three minutes for what Ray Train (2.60) keeps for that of a killed driver
    workers = 2 if name == "all-reduce" else {"min": 1, "max": 4}
    on_cluster = job["run"] | {"workers": workers, "address": cluster.address}
    text = yaml.safe_dump(job | {"run": on_cluster, "tracking": {"type": "mlflow"}})
    (workplace / "job.yaml").write_text(text)
    disturbed = workplace / "runs" / "disturbed"
    injector = None
    try:
        for _ in range(nodes):
            cluster.add()
        injector = Injector(cluster, disturbed, seed)
        for _ in range(faults):
            injector.wait_for_step(min(injector.steps() + 2, steps))
            if injector.steps() == steps:
                break
            injector.inject()
        injector.finish()
    finally:
        if injector is not None:
            injector.close()
            print(*injector.log, f"{time.monotonic() - started:.0f} s", sep="\n")
        cluster.close()

    assert len(injector.log) >= 0.7 * faults, "the run was done too soon"
    rows = read_rows_without_times(disturbed)
    expected_rows = read_rows_without_times(undisturbed)
    if name in WITHOUT_BITS:
        assert [row["step"] for row in rows] == list(range(1, steps + 1))
        assert mean_last_loss(rows) == pytest.approx(mean_last_loss(expected_rows), rel=0.1)
    else:
        assert read_theta(disturbed) == read_theta(undisturbed)
        assert rows == expected_rows
    assert not [path for path in injector.shared_files if path.exists()]

    import_mlflow()
    from mlflow.tracking import MlflowClient

    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    run_id = checkpoints.load(disturbed).progress.tracking_ids["mlflow"]
    tracked_steps = [metric.step for metric in client.get_metric_history(run_id, "loss_after")]
    assert sorted(tracked_steps) == list(range(1, steps + 1))
