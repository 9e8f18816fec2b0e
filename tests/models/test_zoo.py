"""Every model of the zoo: MAML's gradient is that of plain autograd, and two Ray workers compute the same bits.

The hand-written gradient puts tensors in the place of the module's parameters and calls the module. It uses neither
distmeta's gradients nor torch.func.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import tree
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from zoo import ALL, REFUSED, ZOO, Kind

import distmeta
from distmeta.compute.episodes import draw_episodes
from distmeta.compute.execution import Execution, shard_gradient
from distmeta.compute.vectors import Layout
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.protocols import Episode
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.problem import Problem, apply_job_numerics, build_problem
from distmeta.runtime.resolve import resolve
from distmeta.runtime.shards import Shard, WorkerSpec
from distmeta.runtime.worker import Worker, plan_shards
from distmeta.seeding import task_ids, torch_seed
from distmeta.trees import tree_map

FOLDER = str(Path(__file__).parent)
INNER_STEPS = 2
TASKS = 2
LOOP_ONLY = (
    "activation checkpointing",
    "dropout",
    "packed sequences",
    "physics-informed",
    "sparse mixture of experts",
    "straight-through Function",
    "unused parameters",
)
"""Kinds that torch.func cannot compute many of at once."""
TRAINED = ("transformer with a padding mask",)
"""Kinds that every run of the tests trains with two workers."""
LOOP = Execution("loop", 1)


def make_cases() -> list[Any]:
    """Return every kind as a parameter of a test. Those whose package is not installed are skipped."""
    cases = []
    for name, kind in ZOO.items():
        skip = pytest.mark.skipif(find_spec(kind.package) is None, reason=f"{kind.package} is not installed")
        cases.append(pytest.param(name, marks=skip))
    return cases


def make_training_cases() -> list[Any]:
    """The same for whole trainings, most of which are slow tests."""
    return [
        case
        if case.values[0] in TRAINED
        else pytest.param(*case.values, marks=[*case.marks, pytest.mark.slow])
        for case in make_cases()
    ]


@pytest.fixture(autouse=True)
def path_of_the_zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)


def build_job(name: str, **run: Any) -> Job:
    algorithm = {"type": "maml", "inner_lr": ALL[name].inner_lr, "inner_steps": INNER_STEPS}
    settings = {"steps": 2, "tasks_per_step": TASKS, "shards": 2, "eval_every": 1, "eval_tasks": 2} | run
    part = {"kind": name}
    return Job.parse(
        tree(
            algorithm,
            model={"type": "zoo:build_model", **part},
            tasks={"type": "zoo:ZooTasks", **part},
            run=settings,
        )
    )


@cache
def resolve_kind(name: str) -> Problem:
    """Return the problem as a run computes it."""
    problem = build_problem(build_job(name))
    with apply_job_numerics(problem.job, problem.device):
        return resolve(problem)


def cast(tree: Any, dtype: torch.dtype) -> Any:
    """Return the pytree with its floats in `dtype`, and its complex numbers of that precision."""

    def cast_leaf(leaf: Tensor) -> Tensor:
        if leaf.is_complex():
            return leaf.to(dtype.to_complex())
        return leaf.to(dtype) if leaf.is_floating_point() else leaf

    return tree_map(cast_leaf, tree)


# --- By hand ------------------------------------------------------------------------------------------------------


class OpenModule(NamedTuple):
    """A module whose trainable parameters can be exchanged for tensors that have a graph."""

    module: nn.Module
    places: dict[str, list[tuple[nn.Module, str]]]
    """Where each parameter is used: tied weights have several places."""

    @classmethod
    def of(cls, module: nn.Module) -> OpenModule:
        names = {parameter: name for name, parameter in module.named_parameters()}
        places = defaultdict(list)
        for path, parameter in module.named_parameters(remove_duplicate=False):
            owner, _, attribute = path.rpartition(".")
            if parameter.requires_grad:
                places[names[parameter]].append((module.get_submodule(owner), attribute))
        return cls(module, dict(places))

    def call(self, values: Mapping[str, Tensor], x: Any) -> Any:
        for name, value in values.items():
            for owner, attribute in self.places[name]:
                delattr(owner, attribute)
                setattr(owner, attribute, value)
        return self.module(x)


def differentiate_by_hand(
    kind: Kind,
    module: OpenModule,
    theta: Mapping[str, Tensor],
    episode: Episode,
    task_id: Any,
    create_graph: bool = True,
) -> dict[str, Tensor]:
    """Return the meta-gradient of one task.

    Args:
        create_graph: False treats the inner gradients as constants.
    """
    torch.manual_seed(torch_seed(task_id))
    leaves = {name: value.detach().clone().requires_grad_() for name, value in theta.items()}
    phi = dict(leaves)
    for _ in range(INNER_STEPS):
        loss = kind.loss(module.call(phi, episode.support.x), episode.support)
        gradients = torch.autograd.grad(
            loss, list(phi.values()), create_graph=create_graph, allow_unused=True
        )
        phi = {
            name: value if gradient is None else value - kind.inner_lr * gradient
            for (name, value), gradient in zip(phi.items(), gradients, strict=True)
        }
    loss = kind.loss(module.call(phi, episode.query.x), episode.query)
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    pairs = zip(leaves.items(), found, strict=True)
    return {name: torch.zeros_like(leaf) if part is None else part for (name, leaf), part in pairs}


def compute_by_hand(
    name: str, ids: np.ndarray, dtype: torch.dtype, create_graph: bool = True
) -> dict[str, Tensor]:
    """Return the sum of the tasks' meta-gradients, by the names of the module's parameters."""
    problem = resolve_kind(name)
    kind = ZOO[name]
    fresh = (kind.build_plain or kind.build)()
    fresh.load_state_dict(problem.model.module.state_dict())
    module = OpenModule.of(fresh.to(dtype))
    theta = {key.removeprefix("model."): value.to(dtype) for key, value in problem.init().items()}
    total = {key: torch.zeros_like(value) for key, value in theta.items()}
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        for task_id in ids:
            episode = tree_map(
                lambda leaf: leaf[0], draw_episodes(problem.family, "train", np.array([task_id]))
            )
            episode = cast(episode, dtype)
            gradient = differentiate_by_hand(kind, module, theta, episode, task_id, create_graph)
            for key, part in gradient.items():
                total[key] += part
    return total


# --- By distmeta --------------------------------------------------------------------------------------------------


def compute_in_float64(name: str, ids: np.ndarray, execution: Execution) -> dict[str, Tensor]:
    problem = build_problem(build_job(name))
    theta = cast(problem.init(), torch.float64)
    problem.model.to(dtype=torch.float64)
    episodes = cast(draw_episodes(problem.family, "train", ids), torch.float64)
    with apply_job_numerics(problem.job, problem.device):
        result = shard_gradient(problem.algorithm, problem.family.score, theta, episodes, ids, execution)
    return {key.removeprefix("model."): value for key, value in result.gradient.items()}


class Work(NamedTuple):
    """The first step of a run."""

    spec: WorkerSpec
    theta: np.ndarray
    shards: list[Shard]


def plan_first_step(name: str) -> Work:
    problem = resolve_kind(name)
    theta = problem.init()
    layout = Layout.from_theta(theta)
    spec = replace(WorkerSpec.from_problem(problem, layout), folder=FOLDER)
    return Work(spec, layout.flatten(theta), plan_shards(problem, "train", 0, TASKS, 2, INNER_STEPS))


def compute_shard(spec: WorkerSpec, theta: np.ndarray, shard: Shard) -> np.ndarray:
    """Return the shard's gradient, as a worker computes it."""
    gradient = Worker.from_spec(spec).compute(theta, shard).gradient
    assert isinstance(gradient, np.ndarray)
    return gradient.copy()


@cache
def compute_first_step(name: str) -> tuple[np.ndarray, ...]:
    """Return both shards' gradients, computed in this process."""
    work = plan_first_step(name)
    return tuple(compute_shard(work.spec, work.theta, shard) for shard in work.shards)


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return ‖a - b‖ / ‖b‖."""
    assert found.keys() == expected.keys()
    b = torch.cat([expected[key].flatten() for key in expected])
    a = torch.cat([found[key].flatten() for key in expected])
    assert float(b.norm()) > 0
    return float((a - b).norm() / b.norm())


# --- Tests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", make_cases())
def test_gradient_is_that_of_plain_autograd(name: str) -> None:
    problem = resolve_kind(name)
    ids = task_ids(problem.job.seed, "train", 0, TASKS)
    expected = compute_by_hand(name, ids, torch.float64)
    assert distance(compute_by_hand(name, ids, torch.float64, create_graph=False), expected) > 1e-4
    assert distance(compute_in_float64(name, ids, LOOP), expected) <= 1e-9
    if name in LOOP_ONLY:
        assert problem.execution.mode == "loop"
    if problem.execution.mode == "vmap":
        assert distance(compute_in_float64(name, ids, problem.execution), expected) <= 1e-9
    layout = plan_first_step(name).spec.layout
    first_step = layout.unflatten(np.sum(compute_first_step(name), axis=0))
    found = {key.removeprefix("model."): value for key, value in first_step.items()}
    assert distance(found, compute_by_hand(name, ids, torch.float32)) <= 1e-5


@pytest.mark.parametrize("name", REFUSED)
def test_operation_without_second_derivative_is_refused_with_the_remedy(name: str) -> None:
    with pytest.raises(InputError, match=r"torch has no second derivative .*algorithm.first_order=true"):
        resolve_kind(name)
    first_order = build_job(name).replace(algorithm={"first_order": True})
    assert resolve(build_problem(first_order)).job.algorithm.options["first_order"] is True


@pytest.fixture(scope="module")
def actors(cluster: None) -> Iterator[list[Any]]:
    """Two Ray workers for all kinds."""
    import ray

    actor: Any = ray.remote(num_cpus=1)(ShardActor)
    both = [actor.remote(), actor.remote()]
    yield both
    for one in both:
        ray.kill(one)


class ShardActor:
    def compute(self, spec: WorkerSpec, theta: np.ndarray, shard: Shard) -> np.ndarray:
        return compute_shard(spec, theta, shard)


@pytest.mark.parametrize("name", make_cases())
def test_two_workers_compute_the_same_bits(name: str, actors: list[Any]) -> None:
    import ray

    work = plan_first_step(name)
    pairs = zip(actors, work.shards, strict=True)
    found = ray.get([actor.compute.remote(work.spec, work.theta, shard) for actor, shard in pairs])
    for gradient, expected in zip(found, compute_first_step(name), strict=True):
        assert gradient.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", make_training_cases())
def test_training_with_two_workers_is_the_same(
    name: str, cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(FOLDER)
    trained = []
    for workers in (0, 2):
        job = build_job(name, workers=workers).to_dict() | {"output": str(tmp_path)}
        trained.append(checkpoints.load(distmeta.train(Job.parse(job)).run).theta)
    alone, together = trained
    assert all(torch.equal(alone[key], together[key]) for key in alone)
