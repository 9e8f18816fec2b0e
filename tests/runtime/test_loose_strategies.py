"""`async` and `local`, and compressed gradients: what they compute, by hand; what they survive; no bit is promised."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tree
from outcomes import Watching, outcome, trained
from processes import send, worker_pids
from scripted import ScriptedPool

from distmeta.compute.vectors import Layout, tree_sum
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.parameter_server import ParameterServer
from distmeta.runtime.problem import build
from distmeta.runtime.worker import Shard, Worker
from distmeta.strategies import asynchronous
from distmeta.strategies.gradient_step import plan_of
from distmeta.strategies.replica import Round, run_round

RUN = {"steps": 4, "tasks_per_step": 4, "eval_every": 2, "eval_tasks": 4, "workers": 2, "checkpoint_every": 2}
OUTERS = {
    "sgd": {"optimizer": "sgd", "momentum": 0.9, "clip_norm": 0.05},
    "adam": {"optimizer": "adam", "lr": 0.003},
}


def without_ages(found: tuple[Any, Any, Any, list[dict[str, Any]]]) -> Any:
    """An outcome without the columns that only `async` has."""
    rows = [{k: v for k, v in row.items() if k not in ("staleness", "tasks_stale")} for row in found[3]]
    return *found[:3], rows


def scripted(
    job: dict[str, Any],
    ticks: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
    resume: Path | None = None,
    **run: Any,
) -> Path:
    monkeypatch.setattr(asynchronous, "RayPool", partial(ScriptedPool, ticks))
    return trained(job, resume=resume, strategy="async", workers=len(ticks), **run)


def test_async_without_staleness_is_driver_to_the_bit(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = [{"step": 2, "set": {"outer.lr": 0.02, "algorithm.inner_lr": 0.1}}]
    job = tree("maml", outer=OUTERS["sgd"], run=RUN | {"steps": 6, "tasks_per_step": 8}, changes=changes)
    calm = outcome(trained(job, workers=0))
    for aware in (False, True):
        run = scripted(job, (1, 3, 5), monkeypatch, max_staleness=0, staleness_aware=aware)
        assert without_ages(outcome(run)) == calm
        assert {row["staleness"] for row in outcome(run)[3]} == {0.0}


def test_async_drops_what_is_too_old_and_computes_its_tasks_again(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tree("maml", run=RUN | {"steps": 30, "eval_every": 0})
    rows = outcome(scripted(job, (1, 1, 17), monkeypatch, max_staleness=2))[3]
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert all(0 <= row["staleness"] <= 2 and row["tasks"] == 4 for row in rows)
    assert any(row["staleness"] > 0 for row in rows)
    assert 0 < sum(row["tasks_stale"] for row in rows) < 30
    # with room for all that the slow one takes, nothing is dropped
    rows = outcome(scripted(job, (1, 1, 17), monkeypatch, max_staleness=20))[3]
    assert sum(row["tasks_stale"] for row in rows) == 0
    assert max(row["staleness"] for row in rows) > 2


def test_async_takes_up_what_came_during_an_evaluation(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tree("maml", run=RUN | {"steps": 6, "eval_every": 1, "shards": 2})
    rows = outcome(scripted(job, (1, 2, 3, 4), monkeypatch, max_staleness=2))[3]
    assert [row["step"] for row in rows] == list(range(1, 7))


def test_async_by_hand_weighs_gradients_by_their_age(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers, two shards a step, one worker slow: step 2 takes a gradient of theta 0 and one of theta 1."""
    outer = {"optimizer": "sgd", "lr": 0.1}
    job = tree("maml", outer=outer, run={"steps": 2, "tasks_per_step": 2, "shards": 2})
    run = {"max_staleness": 1, "staleness_aware": True, "keep": 9, "checkpoint_every": 1}
    path = scripted(job, (2, 5), monkeypatch, **run)
    assert [row["staleness"] for row in outcome(path)[3]] == [0.0, 0.5]
    problem = build(Job.load(path / "job.yaml"))
    thetas = [checkpoints.load(path / f"checkpoints/step-0000000{step}").theta for step in (0, 1, 2)]
    server = ParameterServer(problem.init(), problem.job.outer)
    flats = [server.layout.flatten(theta) for theta in thetas]
    worker = Worker.of(problem, server.layout)
    # worker 0 takes shards 0, 2 (at 2), 3 (at 4, with theta 1); worker 1 shard 1 (until 5)
    first, second = plan_of(problem, 0), plan_of(problem, 1)

    def gradient(shard: Shard, version: int) -> np.ndarray:
        found = worker.compute(flats[version], replace(shard, version=version)).gradient
        assert isinstance(found, np.ndarray)
        return found

    assert np.allclose(
        flats[1], flats[0] - 0.1 / 2 * (gradient(first[0], 0) + gradient(second[0], 0)), atol=1e-6
    )
    expected = flats[1] - 0.1 / 2 * (gradient(first[1], 0) / 2 + gradient(second[1], 1))
    assert np.allclose(flats[2], expected, atol=1e-6)


def test_async_through_a_lost_worker_and_a_resume(workplace: Path, cluster: None) -> None:
    job = tree("maml", run=RUN | {"strategy": "async", "steps": 8})
    harm = Watching({2: lambda: send(worker_pids()[:1], signal.SIGKILL)})
    run = trained(job, harm, name="begun")
    assert any(text.startswith("lost worker") for text in harm.said)
    trained(job, resume=run, steps=12, workers=1)
    rows = outcome(run)[3]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all(row["staleness"] <= 2 and row["tasks"] == 4 for row in rows)


LOCAL = {"strategy": "local", "local_steps": 2, "replicas": 2, "shards": 3}


def test_local_with_one_replica_one_step_and_plain_averaging_is_driver(workplace: Path) -> None:
    job = tree("maml", outer=OUTERS["adam"], run=RUN | {"workers": 0})
    calm = checkpoints.load(trained(job)).theta
    plain = {"replicas": 1, "local_steps": 1, "local_lr": 1.0, "local_momentum": 0.0}
    local = checkpoints.load(trained(job, strategy="local", **plain)).theta
    for name, value in calm.items():
        torch.testing.assert_close(local[name], value, rtol=1e-5, atol=1e-6)


def test_local_averages_what_replicas_did_on_their_shares(workplace: Path) -> None:
    """By hand: two replicas, two steps of SGD each on its own shards, then Nesterov momentum on the mean delta."""
    outer = {"optimizer": "sgd", "lr": 0.05, "momentum": 0.5}
    job = tree(
        "maml", outer=outer, run=RUN | LOCAL | {"workers": 0, "steps": 2, "eval_every": 0, "local_lr": 0.5}
    )
    path = trained(job)
    problem = build(Job.load(path / "job.yaml"))
    start = checkpoints.load(path / "checkpoints/step-00000000").theta
    deltas = []
    for own in (slice(0, 1), slice(1, 3)):
        server = ParameterServer(start, problem.job.outer)
        worker = Worker.of(problem, server.layout)
        for step in (0, 1):
            found = [worker.compute(server.flat(), shard) for shard in plan_of(problem, step)[own]]
            sums = [result.gradient for result in found if isinstance(result.gradient, np.ndarray)]
            server.step(tree_sum(sums) / np.float32(sum(result.tasks for result in found)))
        deltas.append(server.layout.flatten(start) - server.flat())
    mean = (deltas[0] + deltas[1]) / np.float32(2)
    expected = server.layout.flatten(start) - 0.5 * (mean + 0.9 * mean)
    assert np.allclose(server.layout.flatten(checkpoints.load(path).theta), expected, atol=1e-6)
    assert [row["step"] for row in outcome(path)[3]] == [1, 2]


@pytest.mark.parametrize("steps", [1, 3])
def test_a_round_that_the_same_worker_computes_again_is_the_same(steps: int) -> None:
    """A replica's theta is another vector each time."""
    problem = build(Job.parse(tree("maml", run=RUN | {"workers": 0})))
    layout = Layout.of(problem.init())
    flat, own = layout.flatten(problem.init()), Round(0, 1, 0, steps, 0, problem.job.outer, {})
    worker = Worker.of(problem, layout)
    deltas = [run_round(one, own, flat, {})[1] for one in (worker, worker, Worker.of(problem, layout))]
    assert np.array_equal(deltas[0], deltas[1])
    assert np.array_equal(deltas[0], deltas[2])


@pytest.mark.parametrize("compress", ["none", "int8"])
def test_local_is_the_same_after_a_resume_and_a_lost_worker(
    compress: str, workplace: Path, request: pytest.FixtureRequest
) -> None:
    changes = [{"step": 5, "set": {"outer.lr": 0.005, "algorithm.inner_lr": 0.1}}]
    run = RUN | LOCAL | {"workers": 0, "steps": 8, "compress": compress}
    job = tree("maml", outer=OUTERS["adam"], run=run, changes=changes)
    calm = outcome(trained(job))
    assert [row["step"] for row in calm[3]] == list(range(1, 9))
    assert any(key.endswith("replica1.residual") for key in calm[1]) == (compress == "int8")
    begun = trained(job, name="begun", steps=4)
    trained(job, resume=begun)
    assert outcome(begun) == calm
    if compress == "int8":
        request.getfixturevalue("cluster")
        harm = Watching({2: lambda: send(worker_pids()[:1], signal.SIGKILL)})
        assert outcome(trained(job, harm, workers=2)) == calm
        assert any(text.startswith("lost worker") for text in harm.said)


@pytest.mark.parametrize("clock", [None, 0, [], {"clock": -1}, {"clock": None}])
def test_local_takes_no_clock_that_is_none(clock: Any, workplace: Path) -> None:
    run = trained(tree("maml", run=RUN | LOCAL | {"workers": 0}))
    path = checkpoints.find(run) / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"outer": state["outer"] | {"replicas": clock}}))
    with pytest.raises(InputError, match=r"checkpoint: got .* as the clock of its outer rates"):
        trained(tree("maml", run=RUN | LOCAL | {"workers": 0, "steps": 6}), resume=path.parent)


@pytest.mark.parametrize("compress", ["bf16", "int8"])
def test_compressed_gradients_train_as_well(compress: str, workplace: Path) -> None:
    job = tree("maml", run=RUN | {"workers": 0, "steps": 40, "tasks_per_step": 16, "eval_every": 0})
    plain, coded = outcome(trained(job))[3], outcome(trained(job, compress=compress))[3]
    assert coded[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=0.02)
    assert coded[0]["grad_norm"] != plain[0]["grad_norm"]
    assert coded[-1]["loss_after"] == pytest.approx(plain[-1]["loss_after"], rel=0.1)
