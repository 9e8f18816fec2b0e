"""How a gradient is computed (compiled, in bfloat16, step by step, measured) changes little of what it is."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, tree

import distmeta
from distmeta.compute import probe
from distmeta.compute.compiler import Compiler
from distmeta.compute.episodes import episodes_of
from distmeta.compute.numerics import numerics
from distmeta.compute.shard import WHOLE_SHARD, Execution, shard_gradient
from distmeta.core import InputError
from distmeta.job import Job
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.problem import build
from distmeta.runtime.resolution import resolve
from distmeta.runtime.worker import Worker, WorkerSpec
from distmeta.seeding import task_ids

LOOP, VMAP = Execution("loop", 1), Execution("vmap", WHOLE_SHARD)
CONV = {
    "model": {"type": "conv4", "width": 8, "pool": "stride", "norm": "none"},
    "tasks": {"type": "digits", "ways": 3, "shots": 1, "queries": 2},
}


def gradient(
    job: dict[str, Any], execution: Execution, compiled: Compiler | None = None, dtype: Any = torch.float32
) -> torch.Tensor:
    problem = build(Job.parse(job))
    theta = {name: value.to(dtype) for name, value in problem.init().items()}
    ids = task_ids(0, "train", 0, 4)
    episodes = problem.family.draw("train", ids)
    episodes = torch.utils._pytree.tree_map(
        lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, episodes
    )
    arguments = (problem.algorithm, problem.score("train"), theta, episodes, ids, execution, compiled)
    result = shard_gradient(*arguments)
    again = shard_gradient(*arguments)  # the compiled program itself, no longer beside the eager one
    assert all(torch.equal(result.gradient[name], again.gradient[name]) for name in theta)
    return torch.cat([value.flatten() for value in result.gradient.values()])


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / one.norm())


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_constant_memory_is_exact_over_many_steps(optimizer: str) -> None:
    algorithm = {
        "type": "maml",
        "inner_lr": 0.01,
        "inner_steps": 40,
        "inner_optimizer": optimizer,
        "eps": 1e-3,
    }
    for execution in (LOOP, VMAP):
        whole, steps = (
            gradient(tree(algorithm), execution._replace(differentiation=name), dtype=torch.float64)
            for name in ("reverse", "constant-memory")
        )
        assert apart(whole, steps) <= 1e-9


PEAKS = """
import resource, sys
from test_execution import LOOP, gradient, wide
gradient(wide(2), LOOP)
peaks = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]
for name in ("constant-memory", "reverse"):
    gradient(wide(20), LOOP._replace(differentiation=name))
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(*(b - a for a, b in zip(peaks, peaks[1:])))
"""


def wide(inner_steps: int) -> dict[str, Any]:
    """Inner steps whose graphs are far larger than phi."""
    tasks = {"type": "sinusoid", "shots": 2000, "queries": 10}
    algorithm = {"type": "maml", "inner_lr": 1e-3, "inner_steps": inner_steps}
    return tree(algorithm, tasks=tasks, model={"type": "mlp", "hidden": [128, 128]})


def test_constant_memory_holds_one_steps_graph() -> None:
    """Peak memory of a process of its own: what it adds, and what the whole graph adds to that."""
    done = subprocess.run(
        [sys.executable, "-c", PEAKS], cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY / "tests")},
    )  # fmt: skip
    constant, more = (int(kilobytes) for kilobytes in done.stdout.split())
    assert more > 2 * constant


@pytest.mark.parametrize(
    ("steps", "changes", "expected"),
    [(probe.LONG - 1, CONV, "reverse"), (probe.LONG, CONV, "constant-memory"), (probe.LONG, {}, "reverse")],
)
def test_differentiation_is_settled_by_a_fixed_rule(
    steps: int, changes: dict[str, Any], expected: str
) -> None:
    job = tree({"type": "maml", "inner_lr": 0.01, "inner_steps": steps}, **changes)
    problem = resolve(build(Job.parse(job)))
    assert problem.job.compute.differentiation == problem.execution.differentiation == expected


def test_constant_memory_is_refused_where_steps_draw() -> None:
    job = tree(model={"type": "hard_cases:Dropout"}, compute={"differentiation": "constant-memory"})
    with pytest.raises(InputError, match=r"compute.differentiation: got constant-memory, .* \(dropout\)"):
        resolve(build(Job.parse(job)))


@pytest.mark.parametrize(("job", "execution"), [(tree("maml"), VMAP), (tree("maml", **CONV), LOOP)])
def test_a_compiled_gradient_is_the_eager_one(job: dict[str, Any], execution: Execution) -> None:
    assert apart(gradient(job, execution), gradient(job, execution, Compiler("float32"))) <= 1e-5


def test_a_compiled_result_that_differs_is_refused() -> None:
    calls = count(1)

    def impure(x: torch.Tensor) -> torch.Tensor:
        return x * next(calls)

    with pytest.raises(
        InputError, match=r"compiled gradient differs from the eager one by 1.0e\+00 of its norm"
    ):
        Compiler("float32")("impure", impure, torch.ones(3))


def test_what_cannot_be_compiled_says_why() -> None:
    job = tree(model={"type": "test_models:Branching"})
    with pytest.raises(
        InputError, match=r"compute.compile: got true, but this cannot be compiled \(.*\): use"
    ):
        gradient(job, LOOP, Compiler("float32"))


def test_what_cannot_be_compiled_is_found_out_before_anything_is_written(workplace: Path) -> None:
    job = tree(model={"type": "test_models:Branching"}, compute={"compile": True})
    with pytest.raises(InputError, match=r"compute.compile: got true, but this cannot be compiled"):
        distmeta.train(Job.parse(job))
    assert not (workplace / "runs").exists()


def test_what_is_not_compiled_by_design_is_refused_at_once() -> None:
    with pytest.raises(
        InputError, match=r"compute.compile: got true for maml-plus-plus, .* every outer step"
    ):
        resolve(build(Job.parse(tree("maml-plus-plus", compute={"compile": True}))))
    with pytest.raises(InputError, match=r"compute.compile: got true for a model that draws random numbers"):
        resolve(build(Job.parse(tree(model={"type": "hard_cases:Dropout"}, compute={"compile": True}))))


def test_without_a_compiler_the_whole_run_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    said: list[str] = []
    problem = resolve(build(Job.parse(tree(compute={"compile": True}))), said.append)
    assert problem.job.compute.compile is False
    assert said == [
        "compute.compile: there is no C++ compiler (no-such-compiler) here; the whole run goes without"
    ]


def test_a_worker_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job.parse(tree(compute={"compile": True}))
    layout = distmeta.compute.flat.Layout.of(build(job).init())
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"compute.compile: got true, but there is no C\+\+ compiler"):
        Worker(WorkerSpec(job.tree(), layout, {}, "."))


@pytest.mark.parametrize(("job", "execution"), [(tree("maml"), VMAP), (tree("maml", **CONV), LOOP)])
def test_bfloat16_is_near_and_theta_stays_float32(job: dict[str, Any], execution: Execution) -> None:
    exact = gradient(job, execution)
    with numerics(1, False, "bf16"):
        near = gradient(job, execution)
    assert near.dtype == torch.float32
    assert 1e-5 < apart(exact, near) < 0.2


def test_training_in_bfloat16_learns(workplace: Path) -> None:
    tasks = {"type": "linear", "shots": 5, "queries": 5, "slope": [0.5, 1.0], "offset": [-1, 1]}
    job = tree(
        tasks=tasks, compute={"precision": "bf16"}, run={"steps": 60, "eval_every": 60, "eval_tasks": 50}
    )
    run = distmeta.train(Job.parse(job)).run
    stored = checkpoints.load(run)
    assert all(value.dtype == torch.float32 for value in stored.theta.values())
    first, last = (distmeta.evaluate(run / "checkpoints" / f"step-{k:08d}") for k in (0, 60))
    assert last.figures["loss_after"] < 0.5 * first.figures["loss_after"]


def test_tf32_needs_a_gpu() -> None:
    with pytest.raises(
        InputError, match=r"compute.precision: got tf32 without GPUs .*, expected float32 or bf16"
    ):
        resolve(build(Job.parse(tree(compute={"precision": "tf32"}))))


def test_what_was_measured_is_written_down_and_obeyed(workplace: Path) -> None:
    job = Job.parse(tree(compute={"execution": "measure"}, run={"steps": 3, "name": "measured"}))
    problem = resolve(build(job))
    assert (
        problem.job.compute.execution == problem.execution.mode == "vmap"
    )  # over a small MLP, many times faster
    written = Job.load(distmeta.train(job).run / "job.yaml")
    assert written.compute.execution == "vmap"
    assert resolve(build(written)).job == written


def test_the_fastest_way_is_taken() -> None:
    import time

    pauses = {1: 0.02, 2: 0.0, 3: 0.04}
    tried: list[int] = []

    def trial(way: Execution) -> None:
        tried.append(way.chunk)
        time.sleep(pauses[way.chunk])

    ways = [Execution("vmap", chunk) for chunk in pauses]
    assert probe.fastest(ways, trial) == ways[1]
    assert tried == [1, 2, 3] * 4


def test_collected_episodes_go_through_every_way() -> None:
    problem = build(Job.parse(tree(tasks={"type": "hard_cases:Bandit"})))
    theta, ids = problem.init(), task_ids(0, "train", 0, 4)
    episodes = episodes_of(problem.family, problem.algorithm, theta, "train", ids, 2)
    found = []
    for differentiation in ("reverse", "constant-memory"):
        way = VMAP._replace(differentiation=differentiation)
        result = shard_gradient(problem.algorithm, problem.score("train"), theta, episodes, ids, way)
        found.append(np.concatenate([value.flatten().numpy() for value in result.gradient.values()]))
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-6)
