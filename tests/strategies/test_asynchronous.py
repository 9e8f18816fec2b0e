"""`async`: what it computes, by hand and by a scripted pool; and what it survives. Its bits depend on timing."""

from __future__ import annotations

import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tree
from support.outcomes import ActingReporter, read_outcome, train_job
from support.processes import find_workers, send_signal
from support.scripted_pool import ScriptedPool

from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.parameter_server import ParameterServer
from distmeta.runtime.problem import build_problem
from distmeta.runtime.shards import Shard
from distmeta.runtime.worker import Worker
from distmeta.strategies import asynchronous
from distmeta.strategies.driver import plan_step

RUN = {"steps": 4, "tasks_per_step": 4, "eval_every": 2, "eval_tasks": 4, "workers": 2, "checkpoint_every": 2}
SGD = {"optimizer": "sgd", "momentum": 0.9, "clip_norm": 0.05}


def train_scripted(
    job: dict[str, Any],
    ticks: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    **run: Any,
) -> Path:
    """Train with `async` on a pool whose worker i needs `ticks[i]` per shard."""
    monkeypatch.setattr(asynchronous, "RayPool", partial(ScriptedPool, ticks))
    return train_job(job, strategy={"type": "async", **options}, workers=len(ticks), **run)


def test_async_without_staleness_equals_driver(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = [{"step": 2, "set": {"outer.lr": 0.02, "algorithm.inner_lr": 0.1}}]
    job = tree("maml", outer=SGD, run=RUN | {"steps": 6, "tasks_per_step": 8}, changes=changes)
    expected = read_outcome(train_job(job, workers=0))
    for aware in (False, True):
        options = {"max_staleness": 0, "staleness_aware": aware}
        *state, rows = read_outcome(train_scripted(job, (1, 3, 5), monkeypatch, options))
        assert {row["staleness"] for row in rows} == {0.0}
        own_columns = ("staleness", "tasks_stale")
        rows = [{key: value for key, value in row.items() if key not in own_columns} for row in rows]
        assert (*state, rows) == expected


def test_gradients_that_are_too_old_are_computed_again(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tree("maml", run=RUN | {"steps": 30, "eval_every": 0})
    rows = read_outcome(train_scripted(job, (1, 1, 17), monkeypatch, {"max_staleness": 2}))[3]
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert all(0 <= row["staleness"] <= 2 and row["tasks"] == 4 for row in rows)
    assert any(row["staleness"] > 0 for row in rows)
    assert 0 < sum(row["tasks_stale"] for row in rows) < 30
    # if everything that the slow worker computes may be used, nothing is dropped
    rows = read_outcome(train_scripted(job, (1, 1, 17), monkeypatch, {"max_staleness": 20}))[3]
    assert sum(row["tasks_stale"] for row in rows) == 0
    assert max(row["staleness"] for row in rows) > 2


def test_gradients_that_arrive_during_an_evaluation_are_used(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tree("maml", run=RUN | {"steps": 6, "eval_every": 1, "shards": 2})
    rows = read_outcome(train_scripted(job, (1, 2, 3, 4), monkeypatch, {"max_staleness": 2}))[3]
    assert [row["step"] for row in rows] == list(range(1, 7))


def test_gradients_are_weighted_by_their_age(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: two workers, two shards per step, one worker slow. Step 2 uses gradients of theta 0 and of theta 1."""
    outer = {"optimizer": "sgd", "lr": 0.1}
    job = tree("maml", outer=outer, run={"steps": 2, "tasks_per_step": 2, "shards": 2})
    options = {"max_staleness": 1, "staleness_aware": True}
    run = train_scripted(job, (2, 5), monkeypatch, options, keep=9, checkpoint_every=1)
    assert [row["staleness"] for row in read_outcome(run)[3]] == [0.0, 0.5]
    problem = build_problem(Job.load(run / "job.yaml"))
    server = ParameterServer(problem.init(), problem.job.outer)
    flats = []
    for step in (0, 1, 2):
        theta = checkpoints.load(run / f"checkpoints/step-0000000{step}").theta
        flats.append(server.layout.flatten(theta))
    worker = Worker(problem, server.layout)

    def gradient(shard: Shard, version: int) -> np.ndarray:
        result = worker.compute(flats[version], replace(shard, version=version))
        assert isinstance(result.gradient, np.ndarray)
        return result.gradient

    # worker 0 takes shards 0, 2 (at time 2) and 3 (at time 4, with theta 1); worker 1 takes shard 1 (until time 5)
    first = plan_step(problem, 0)
    second = plan_step(problem, 1)
    expected = flats[0] - 0.1 / 2 * (gradient(first[0], 0) + gradient(second[0], 0))
    assert np.allclose(flats[1], expected, atol=1e-6)
    expected = flats[1] - 0.1 / 2 * (gradient(first[1], 0) / 2 + gradient(second[1], 1))
    assert np.allclose(flats[2], expected, atol=1e-6)


@pytest.mark.slow
def test_lost_worker_and_resume(workplace: Path, cluster: None) -> None:
    job = tree("maml", run=RUN | {"steps": 8}, strategy={"type": "async"})
    reporter = ActingReporter({2: lambda: send_signal(find_workers()[:1], signal.SIGKILL)})
    run = train_job(job, reporter, name="begun")
    assert any(text.startswith("lost worker") for text in reporter.reports)
    train_job(job, resume=run, steps=12, workers=1)
    rows = read_outcome(run)[3]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all(row["staleness"] <= 2 and row["tasks"] == 4 for row in rows)


def test_several_outer_epochs_are_refused(workplace: Path) -> None:
    epochs = {"type": "maml-rl", "inner_lr": 0.1, "outer_epochs": 3}
    policies = {"model": {"type": "gaussian", "hidden": [4]}, "tasks": {"type": "navigation", "horizon": 4}}
    job = tree(epochs, run={"workers": 1}, strategy={"type": "async"}, **policies)
    with pytest.raises(
        InputError, match=r"^strategy.type: got 'async' for an algorithm that takes 3 outer steps"
    ):
        train_job(job)
