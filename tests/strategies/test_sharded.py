"""`sharded` has the theta and state of `driver` to the bit, through lost workers and servers."""

from __future__ import annotations

import math
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import POLICIES, tree
from support.outcomes import ActingReporter, read_outcome, train_job
from support.processes import find_actors, find_workers, send_signal, wait_until_gone

import distmeta
from distmeta.compute.vectors import choose_edges
from distmeta.config.job import Job
from distmeta.runtime.outer_rates import OuterRates
from distmeta.runtime.parameter_server import ParameterServer, tree_sum
from distmeta.runtime.problem import build_problem
from distmeta.strategies.slices import SliceServer, SliceSpec, cut_moments, join_moments, local_ranges

WIDE = {"type": "mlp", "hidden": [400, 400], "activation": "tanh"}
"""162,001 parameters: three blocks of the norm, with tensors that lie across their edges."""
RUN = {"steps": 4, "tasks_per_step": 4, "eval_every": 2, "eval_tasks": 4, "workers": 2, "checkpoint_every": 2}
CLIPPED = {
    "clip_norm": 0.05,
    "schedule": {"type": "cosine", "steps": 6, "final": 0.1},
    "groups": {"*bias": {"lr": 0.02, "weight_decay": 0.0}},
}
OUTERS = {
    "sgd": {"optimizer": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.01, **CLIPPED},
    "adam": {"optimizer": "adam", "lr": 0.003, **CLIPPED},
    "adamw": {"optimizer": "adamw", "lr": 0.003, "weight_decay": 0.1},
    "rmsprop": {"optimizer": "rmsprop", "lr": 0.003, "momentum": 0.5, **CLIPPED},
}


def wide_job(outer: str = "adam", **run: Any) -> dict[str, Any]:
    return tree("maml", model=WIDE, outer=OUTERS[outer], run=RUN | run)


@pytest.mark.parametrize("servers", [1, 2, 3])
@pytest.mark.parametrize("outer", OUTERS)
def test_slices_step_like_one_server_to_the_bit(outer: str, servers: int) -> None:
    """Sums, mean, clipping and optimizer. The state comes from one server and is compared with it at the end."""
    tasks = 7
    job = Job.parse(wide_job(outer))
    server = ParameterServer(build_problem(job).init(), job.outer)
    layout = server.layout
    edges = choose_edges(layout.size, servers)
    assert len(edges) == servers + 1
    random = np.random.default_rng(0)

    def draw_gradients() -> list[np.ndarray]:
        gradients = []
        for _ in range(3):
            named = {
                name: torch.from_numpy(random.standard_normal(shape))
                for name, shape in zip(layout.names, layout.shapes, strict=True)
            }
            gradients.append(layout.flatten(named))
        return gradients

    def mean(gradients: list[np.ndarray]) -> np.ndarray:
        return tree_sum(gradients) / np.float32(tasks)

    server.step(mean(draw_gradients()))
    tensors, _ = server.state()
    outer_rates = OuterRates(layout.names, job.outer, 1)
    groups = outer_rates.groups
    slices = []
    for start, stop in pairwise(edges):
        spans = layout.spans(start, stop)
        names = [span.name for span in spans]
        options = tuple(groups.options[groups.indices[layout.names.index(name)]] for name in names)
        spec = SliceSpec(local_ranges(spans), options, job.outer, cut_moments(spans, tensors))
        slices.append((SliceServer(server.flat()[start:stop], spec), names, start, stop))
    for step in range(3):
        gradients = draw_gradients()
        norm_sums: list[float] = []
        for one_slice, _, start, stop in slices:
            for position in (2, 0, 1):
                one_slice.receive(step, position, gradients[position][start:stop])
            is_finite, sums = one_slice.average(tasks)
            assert is_finite
            norm_sums += sums
        rates = dict(zip(layout.names, outer_rates.of_tensors(), strict=True))
        outer_rates.advance()
        norm = math.sqrt(math.fsum(norm_sums))
        assert norm == server.step(mean(gradients))
        limit = job.outer.clip_norm
        factor = limit / norm if limit is not None and norm > limit else None
        parts = []
        for one_slice, names, _, _ in slices:
            _, part = one_slice.step(factor, [rates[name] for name in names])
            parts.append(part)
        assert np.array_equal(np.concatenate(parts), server.flat())
    joined = join_moments(layout, edges, [one_slice.moments() for one_slice, *_ in slices])
    expected, _ = server.state()
    assert joined.keys() == expected.keys()
    assert all(torch.equal(joined[key], value) for key, value in expected.items())


def test_lost_workers_and_a_lost_server_do_not_change_the_result(workplace: Path, cluster: None) -> None:
    expected = read_outcome(train_job(wide_job(workers=0)))
    servers_seen: list[int] = []

    def kill_server() -> None:
        servers = find_actors("SliceServer")
        servers_seen.append(len(servers))
        send_signal(servers[:1], signal.SIGKILL)

    def kill_worker() -> None:
        send_signal(find_workers()[:1], signal.SIGKILL)

    reporter = ActingReporter({1: kill_worker, 3: kill_server})
    assert read_outcome(train_job(wide_job(), reporter, strategy={"type": "sharded"})) == expected
    assert servers_seen == [2]
    assert any(text.startswith("lost worker") for text in reporter.reports), reporter.reports
    rewinds = [text for text in reporter.reports if "back to the checkpoint" in text]
    assert [text.rpartition(" ")[2] for text in rewinds] == ["2"], reporter.reports
    assert not wait_until_gone(find_actors("SliceServer"), 30), "servers end with the run"


@pytest.mark.slow  # slices are compared with one server by hand above, in both directions
def test_checkpoints_of_driver_and_sharded_are_interchangeable(workplace: Path, cluster: None) -> None:
    """With clipping, momentum, rates of some tensors, and tasks that are left out."""
    job = wide_job("sgd", tasks_per_step=16) | {"tasks": {"type": "hard_cases:SomeTasksWithNaN"}}
    expected = read_outcome(train_job(job, workers=0, steps=6))
    rows = expected[3]
    assert sum(row["tasks_dropped"] for row in rows) > 0
    assert rows[0]["grad_norm"] > 0.05, "the gradient is clipped"
    run = train_job(job, workers=0, steps=2, name="begun")
    train_job(job, strategy={"type": "sharded", "servers": 2}, workers=1, steps=4, resume=run)
    assert Job.load(run / "job.yaml").strategy.type == "sharded"
    assert distmeta.evaluate(run, ["run.eval_tasks=4"]).tasks == 4
    train_job(job, workers=0, steps=6, resume=run)
    assert read_outcome(run) == expected


@pytest.mark.slow
def test_outer_epochs_and_changes(workplace: Path, cluster: None) -> None:
    epochs = {"type": "maml-rl", "inner_lr": 0.1, "kl": 0.1, "outer_epochs": 3}
    changes = [{"step": 1, "set": {"outer.lr": 0.02}}, {"step": 2, "set": {"algorithm.inner_lr": 0.05}}]
    job = tree(epochs, run=RUN | {"steps": 3}, changes=changes, **POLICIES)
    expected = read_outcome(train_job(job, workers=0))
    reporter = ActingReporter()
    run = train_job(job, reporter, strategy={"type": "sharded", "servers": 3}, workers=1)
    assert read_outcome(run) == expected
    assert any("go to 1 of 3 servers" in text for text in reporter.reports), reporter.reports
