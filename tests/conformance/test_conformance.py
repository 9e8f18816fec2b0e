"""Every registered algorithm, and the protocol's hard cases, do what the protocol promises."""

from __future__ import annotations

import copy
import pickle
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ALGORITHMS, tree
from torch._subclasses.fake_tensor import FakeTensorMode

from distmeta.compute.episodes import make_episodes
from distmeta.compute.execution import Execution, compute_groups, shard_gradient
from distmeta.compute.gradient import build_objective, support_at, unroll
from distmeta.compute.scoring import score_tasks
from distmeta.config.catalog import ALGORITHMS as REGISTERED
from distmeta.config.job import Job
from distmeta.protocols import Episode, Theta
from distmeta.runtime.parameter_server import ParameterServer
from distmeta.runtime.problem import Problem, build_problem
from distmeta.seeding import task_ids
from distmeta.trees import tree_leaves, tree_map

HARD = {
    "memory": tree({"type": "hard_cases:MemoryRegressor"}),
    "pairwise": tree({"type": "hard_cases:PairwiseMAML"}),
    "policy-gradient": tree("maml", tasks={"type": "hard_cases:TwoArmedBandit"}),
}
CASES = {name: tree(name) for name in ALGORITHMS} | HARD
EXACT = (
    "maml",
    "anil",
    "boil",
    "maml-plus-plus",
    "cavia",
    "meta-sgd",
    "meta-curvature",
    "bilevel",
    "protonet",
    "matching",
    "matching-fce",
    "hypernet",
    "hypernet-regression",
    "snail",
    "maml-rl",
    "meta-sgd-policy",
    "rl2",
    "memory",
    "pairwise",
    "policy-gradient",
)
"""Algorithms whose meta-gradient is the derivative of their meta-loss."""
LOOP = Execution("loop", 1)
VMAP = Execution("vmap", 2**31)
OTHERS = (
    VMAP,
    LOOP._replace(differentiation="constant-memory"),
    VMAP._replace(differentiation="constant-memory"),
)


def test_every_registered_algorithm_is_tested() -> None:
    assert {case["type"] for case in ALGORITHMS.values()} == set(REGISTERED)


def parts(
    name: str | dict[str, Any], tasks: int = 4, dtype: torch.dtype = torch.float32
) -> tuple[Problem, Theta, Episode, np.ndarray]:
    problem = build_problem(Job.parse(CASES[name] if isinstance(name, str) else name))
    theta = problem.init()
    ids = task_ids(0, "train", 0, tasks)
    episodes = make_episodes(
        problem.family, problem.algorithm, theta, "train", ids, problem.algorithm.inner_steps
    )
    problem.model.to(dtype=dtype)
    theta = {key: value.to(dtype) for key, value in theta.items()}
    episodes = tree_map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, episodes)
    return problem, theta, episodes, ids


def gradient(
    name: str | dict[str, Any], execution: Execution, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    problem, theta, episodes, ids = parts(name, dtype=dtype)
    algorithm = problem.training_at(0)  # MAML++ has the loss of every step there
    result = shard_gradient(algorithm, problem.score("train"), theta, episodes, ids, execution)
    return torch.cat([result.gradient[key].flatten() for key in theta])


loop_gradient = cache(partial(gradient, execution=LOOP))
"""The gradient that all others are compared with, computed once."""


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_deterministic_and_changes_no_argument(name: str) -> None:
    problem, theta, episodes, ids = parts(name)
    before = copy.deepcopy((theta, episodes))
    results = [
        shard_gradient(problem.algorithm, problem.score("train"), theta, episodes, ids, LOOP)
        for _ in range(2)
    ]
    for key in theta:
        assert torch.equal(theta[key], before[0][key])
        assert torch.equal(results[0].gradient[key], results[1].gradient[key])
    tree_map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), episodes, before[1])


@pytest.mark.parametrize("name", CASES)
def test_gradient_has_the_keys_shapes_and_dtypes_of_theta(name: str) -> None:
    problem, theta, episodes, ids = parts(name)
    result = shard_gradient(problem.algorithm, problem.score("train"), theta, episodes, ids, LOOP)
    assert {k: (v.shape, v.dtype) for k, v in result.gradient.items()} == {
        k: (v.shape, v.dtype) for k, v in theta.items()
    }
    assert result.tasks == len(ids)
    assert all(bool(torch.isfinite(v).all()) for v in result.gradient.values())
    assert any(bool(v.any()) for v in result.gradient.values())
    assert "loss_after" in result.metrics
    assert ("loss_before" in result.metrics) == (problem.algorithm.inner_steps > 0)
    assert all(column.shape == (len(ids),) for column in result.metrics.values())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("execution", OTHERS, ids=lambda e: f"{e.mode}-{e.differentiation}")
@pytest.mark.parametrize("name", CASES)
def test_every_execution_and_differentiation_gives_the_same_gradient(
    name: str, execution: Execution, dtype: torch.dtype, tolerance: float
) -> None:
    loop = loop_gradient(name, dtype=dtype)
    other = gradient(name, execution, dtype)
    assert float((loop - other).norm() / loop.norm()) <= tolerance


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in {"mann-ntm", "mann-dnc"} else name
        for name in CASES
    ],
)
def test_everything_is_on_one_device(name: str) -> None:
    """Nothing creates tensors on the CPU that would meet those of a GPU. Fake tensors on the device `meta` check it."""
    problem, theta, episodes, _ = parts(name, tasks=2)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    problem.model.to("meta")
    theta, episodes, problem.model.constants = tree_map(
        lambda leaf: fake.from_tensor(leaf.to("meta")), (theta, episodes, problem.model.constants)
    )
    groups = tree_map(lambda leaf: leaf.view(-1, problem.algorithm.group_size, *leaf.shape[1:]), episodes)
    with fake:
        objective = build_objective(problem.training_at(0), problem.score("train"))
        found = compute_groups(VMAP, objective, theta, groups, is_traced=True)
    leaves = tree_leaves(found)
    assert len(leaves) > len(theta)
    assert {leaf.device.type for leaf in leaves} == {"meta"}


@pytest.mark.parametrize("norm", ["batch", "group", "layer", "none"])
def test_vmap_equals_loop_through_every_norm(norm: str) -> None:
    """The second derivatives of batch and layer norm are wrong in the gradient of a vmapped loss (torch 2.13)."""
    job = tree(
        model={"type": "conv4", "width": 16, "norm": norm},
        tasks={"type": "digits", "ways": 3, "shots": 1, "queries": 3},
    )
    loop, vmap = (gradient(job, execution, torch.float64) for execution in (LOOP, VMAP))
    assert float((loop - vmap).norm() / loop.norm()) <= 1e-9


@pytest.mark.parametrize("name", EXACT)
def test_gradient_equals_finite_differences(name: str) -> None:
    problem, theta, episodes, ids = parts(name, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    direction = {k: torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in theta.items()}

    def run(scale: float):
        moved = {k: v + scale * direction[k] for k, v in theta.items()}
        return shard_gradient(problem.algorithm, problem.score("train"), moved, episodes, ids, LOOP)

    def total(scale: float) -> float:
        if name == "pairwise":  # its loss is not the sum of the query losses in its metrics
            moved = {k: v + scale * direction[k] for k, v in theta.items()}
            return pairwise_total(problem, moved, episodes)
        return replayed_loss(problem, {k: v + scale * direction[k] for k, v in theta.items()}, episodes)

    exact = sum(float((run(0.0).gradient[k] * direction[k]).sum()) for k in theta)
    h = 1e-5
    measured = (total(h) - total(-h)) / (2 * h)
    assert measured == pytest.approx(exact, rel=1e-6)


def replayed_loss(problem: Problem, theta: Theta, episodes: Episode) -> float:
    """Return the sum of the tasks' query losses after the inner loop, using only the protocol's four functions."""
    algorithm = problem.algorithm
    score = problem.score("train")
    total = 0.0
    for t in range(4):
        episode = tree_map(lambda leaf, t=t: leaf[t], episodes)
        state = algorithm.begin(theta, support_at(episode.support, 0))
        for k in range(algorithm.inner_steps):
            state = algorithm.step(theta, state, support_at(episode.support, k), k)
        loss, _ = score(algorithm.predict(theta, state, episode.query.x), episode.query)
        total += float(loss.detach())
    return total


def pairwise_total(problem: Problem, theta: Theta, episodes: Episode) -> float:
    pairs = [tree_map(lambda leaf, g=g: leaf[2 * g : 2 * g + 2], episodes) for g in range(2)]
    losses = [problem.algorithm.meta_loss(theta, pair, unroll, problem.score("train"))[0] for pair in pairs]
    return 2 * float(sum(losses))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithm_survives_pickling(name: str) -> None:
    problem, theta, episodes, ids = parts(name)
    other = pickle.loads(pickle.dumps(problem.algorithm))
    args = (theta, episodes, ids, LOOP)
    ours = shard_gradient(problem.algorithm, problem.score("train"), *args).gradient
    theirs = shard_gradient(other, problem.score("train"), *args).gradient
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("name", ["maml", "fomaml", "reptile", "imaml", "memory"])
def test_training_improves_a_toy_task_family(name: str) -> None:
    tasks = {
        "type": "linear",
        "shots": 5,
        "queries": 5,
        "slope": [0.5, 1.0],
        "offset": [-1, 1],
        "x_range": [-1, 3],
    }
    job = CASES[name] | {"tasks": tasks}
    problem = build_problem(Job.parse(job))
    algorithm = problem.algorithm
    score = problem.score("val")
    server = ParameterServer(problem.init(), problem.job.outer)
    ids = task_ids(1, "val", 0, 50)

    def loss() -> float:
        scores = score_tasks(algorithm, score, server.theta(), problem.family.draw("val", ids), ids, VMAP)
        return float(scores.metrics["loss"][:, -1].mean())

    first = loss()
    for step in range(60):
        train_ids = task_ids(1, "train", step, 8)
        result = shard_gradient(
            algorithm,
            problem.score("train"),
            server.theta(),
            problem.family.draw("train", train_ids),
            train_ids,
            VMAP,
        )
        server.step(server.layout.flatten(result.gradient) / 8)
    assert loss() < 0.5 * first


@pytest.mark.parametrize("name", ["maml", "reptile", "imaml"])
def test_evaluation_goes_past_the_trained_steps(name: str) -> None:
    problem, theta, episodes, ids = parts(name)
    scores = score_tasks(problem.algorithm, problem.score("test"), theta, episodes, ids, LOOP, steps=7)
    short = score_tasks(problem.algorithm, problem.score("test"), theta, episodes, ids, LOOP, steps=2)
    assert scores.metrics["loss"].shape == (4, 8)
    np.testing.assert_array_equal(scores.metrics["loss"][:, :3], short.metrics["loss"])
