"""`local`: what replicas compute, by hand; resumes and lost workers; compressed gradients and deltas."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tree
from support.outcomes import ActingReporter, read_outcome, train_job
from support.processes import find_workers, send_signal

from distmeta.compute.vectors import Layout
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.parameter_server import ParameterServer, tree_sum
from distmeta.runtime.problem import build_problem
from distmeta.runtime.worker import Worker
from distmeta.strategies.driver import plan_step
from distmeta.strategies.replica import Round, run_round

RUN = {
    "steps": 4,
    "tasks_per_step": 4,
    "shards": 3,
    "eval_every": 2,
    "eval_tasks": 4,
    "checkpoint_every": 2,
}
LOCAL = {"type": "local", "local_steps": 2, "replicas": 2}
ADAM = {"optimizer": "adam", "lr": 0.003}


def test_one_replica_with_one_step_and_plain_averaging_equals_driver(workplace: Path) -> None:
    job = tree("maml", outer=ADAM, run=RUN)
    expected = checkpoints.load(train_job(job)).theta
    plain = {"type": "local", "replicas": 1, "local_steps": 1, "local_lr": 1.0, "local_momentum": 0.0}
    theta = checkpoints.load(train_job(job, strategy=plain)).theta
    for name, value in expected.items():
        torch.testing.assert_close(theta[name], value, rtol=1e-5, atol=1e-6)


def test_deltas_of_replicas_are_averaged(workplace: Path) -> None:
    """By hand: two replicas take two SGD steps on their own shards; then Nesterov momentum on the mean delta."""
    outer = {"optimizer": "sgd", "lr": 0.05, "momentum": 0.5}
    job = tree(
        "maml", outer=outer, run=RUN | {"steps": 2, "eval_every": 0}, strategy=LOCAL | {"local_lr": 0.5}
    )
    run = train_job(job)
    problem = build_problem(Job.load(run / "job.yaml"))
    start = checkpoints.load(run / "checkpoints/step-00000000").theta
    deltas = []
    for share in (slice(0, 1), slice(1, 3)):
        server = ParameterServer(start, problem.job.outer)
        worker = Worker(problem, server.layout)
        for step in (0, 1):
            results = [worker.compute(server.flat(), shard) for shard in plan_step(problem, step)[share]]
            gradients = [result.gradient for result in results if isinstance(result.gradient, np.ndarray)]
            tasks = sum(result.tasks for result in results)
            server.step(tree_sum(gradients) / np.float32(tasks))
        deltas.append(server.layout.flatten(start) - server.flat())
    mean = (deltas[0] + deltas[1]) / np.float32(2)
    expected = server.layout.flatten(start) - 0.5 * (mean + 0.9 * mean)
    theta = server.layout.flatten(checkpoints.load(run).theta)
    assert np.allclose(theta, expected, atol=1e-6)
    assert [row["step"] for row in read_outcome(run)[3]] == [1, 2]


@pytest.mark.parametrize("steps", [1, 3])
def test_round_computed_twice_by_one_worker_is_the_same(steps: int) -> None:
    """A replica's theta is a different vector each time, which the worker must notice."""
    problem = build_problem(Job.parse(tree("maml", run=RUN)))
    layout = Layout.from_theta(problem.init())
    flat = layout.flatten(problem.init())
    one_round = Round(0, 1, 0, steps, 0, problem.job.outer, {})
    worker = Worker(problem, layout)
    other_worker = Worker(problem, layout)
    deltas = [run_round(each, one_round, flat, {})[1] for each in (worker, worker, other_worker)]
    assert np.array_equal(deltas[0], deltas[1])
    assert np.array_equal(deltas[0], deltas[2])


@pytest.mark.parametrize("compress", ["none", "int8"])
def test_resume_and_lost_worker_do_not_change_the_result(
    compress: str, workplace: Path, request: pytest.FixtureRequest
) -> None:
    changes = [{"step": 5, "set": {"outer.lr": 0.005, "algorithm.inner_lr": 0.1}}]
    strategy = LOCAL | {"compress": compress}
    job = tree("maml", outer=ADAM, run=RUN | {"steps": 8}, strategy=strategy, changes=changes)
    expected = read_outcome(train_job(job))
    _, moments, _, rows = expected
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert any(key.endswith("replica1.residual") for key in moments) == (compress == "int8")
    run = train_job(job, name="begun", steps=4)
    train_job(job, resume=run)
    assert read_outcome(run) == expected
    if compress == "int8":
        request.getfixturevalue("cluster")
        reporter = ActingReporter({2: lambda: send_signal(find_workers()[:1], signal.SIGKILL)})
        assert read_outcome(train_job(job, reporter, workers=2)) == expected
        assert any(text.startswith("lost worker") for text in reporter.reports)


@pytest.mark.parametrize("clock", [None, 0, [], [{"clock": -1}] * 2, [{"clock": None}] * 2])
def test_damaged_clock_is_refused(clock: Any, workplace: Path) -> None:
    job = tree("maml", run=RUN, strategy=LOCAL)
    path = checkpoints.find(train_job(job)) / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"outer": state["outer"] | {"replicas": clock}}))
    with pytest.raises(
        InputError,
        match=r"checkpoint: (got .* as the clock|expected the clocks of strategy.replicas = 2)",
    ):
        train_job(job, resume=path.parent, steps=6)


@pytest.mark.parametrize("compress", ["bf16", "int8"])
def test_compressed_gradients_train_as_well(compress: str, workplace: Path) -> None:
    job = tree("maml", run=RUN | {"steps": 40, "tasks_per_step": 16, "eval_every": 0})
    exact = read_outcome(train_job(job))[3]
    compressed = read_outcome(train_job(job, strategy={"type": "driver", "compress": compress}))[3]
    assert compressed[0]["grad_norm"] == pytest.approx(exact[0]["grad_norm"], rel=0.02)
    assert compressed[0]["grad_norm"] != exact[0]["grad_norm"]
    assert compressed[-1]["loss_after"] == pytest.approx(exact[-1]["loss_after"], rel=0.1)
