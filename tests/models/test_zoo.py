"""Every model of the zoo: its meta-gradient is that of a loop written by hand, on any number of workers."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tree
from torch import Tensor, nn
from zoo import HUGGING_FACE, ZOO, BagNet, Entry

import distmeta
from distmeta.compute.episodes import draw_episodes
from distmeta.compute.execution import Execution, shard_gradient
from distmeta.compute.numerics import apply_numerics
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.problem import Problem, apply_job_numerics, build_problem
from distmeta.runtime.resolve import resolve
from distmeta.seeding import task_ids, torch_seed
from distmeta.trees import tree_map

INNER_LR = 0.05
STEPS = 2
TASKS = 2


def name_entry(entry: Entry) -> str:
    return f"{entry.model.__name__}-{entry.kind}-{entry.target}"


def mark_entry(entry: Entry) -> Any:
    needs_transformers = entry.model in HUGGING_FACE
    skip = pytest.mark.skipif(
        needs_transformers and find_spec("transformers") is None, reason="needs transformers"
    )
    return pytest.param(entry, id=name_entry(entry), marks=skip)


ENTRIES = [mark_entry(entry) for entry in ZOO]


@pytest.fixture(autouse=True)
def path_of_this_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def build_job(entry: Entry, **run: Any) -> Job:
    settings = {"tasks_per_step": TASKS, "shards": 1, "eval_every": 1, "eval_tasks": 2} | run
    return Job.parse(
        tree(
            {"type": "maml", "inner_lr": INNER_LR, "inner_steps": STEPS},
            model={"type": f"zoo:{entry.model.__name__}"},
            tasks={"type": "zoo:Tasks", "kind": entry.kind, "target": entry.target},
            run=settings,
        )
    )


def compute_gradient(
    problem: Problem, theta: dict[str, Tensor], episodes: Any, execution: Execution
) -> Tensor:
    with apply_job_numerics(problem.job, problem.device):
        result = shard_gradient(
            problem.algorithm, problem.score("train"), theta, episodes, draw_ids(), execution
        )
    assert result.tasks == TASKS
    return torch.cat([result.gradient[name].flatten() for name in theta])


def draw_ids() -> np.ndarray:
    return task_ids(0, "train", 0, TASKS)


def compute_by_hand(module: nn.Module, score: Any, episodes: Any, ids: np.ndarray) -> Tensor:
    """Return the sum of the tasks' meta-gradients of MAML, by plain autograd."""
    names = [name for name, value in module.named_parameters() if value.requires_grad]
    start = {name: value.detach().clone() for name, value in module.named_parameters()}
    total = torch.zeros(sum(start[name].numel() for name in names), dtype=torch.float64)
    for t, task in enumerate(ids):
        torch.manual_seed(torch_seed(task))
        theta = {name: start[name].clone().requires_grad_() for name in names}
        phi = theta
        support, query = (tree_map(lambda leaf, t=t: leaf[t], part) for part in episodes)
        for _ in range(STEPS):
            loss = score(call_with(module, phi, support.x), support)[0]
            gradient = torch.autograd.grad(loss, list(phi.values()), create_graph=True, allow_unused=True)
            phi = {
                name: value if g is None else value - INNER_LR * g
                for (name, value), g in zip(phi.items(), gradient, strict=True)
            }
        loss = score(call_with(module, phi, query.x), query)[0]
        found = torch.autograd.grad(loss, list(theta.values()), allow_unused=True)
        parts = [
            torch.zeros_like(value) if g is None else g
            for value, g in zip(theta.values(), found, strict=True)
        ]
        total += torch.cat([part.flatten() for part in parts]).double()
    return total


def call_with(module: nn.Module, parameters: dict[str, Tensor], x: Any) -> Any:
    """Call a module with other tensors in the places of its parameters."""
    return torch.func.functional_call(module, parameters, (x,), tie_weights=True)


def build_case(entry: Entry, dtype: torch.dtype) -> tuple[Problem, dict[str, Tensor], Any]:
    problem = build_problem(build_job(entry))
    theta = {name: value.to(dtype) for name, value in problem.init().items()}
    problem.model.to(dtype=dtype)
    episodes = draw_episodes(problem.family, "train", draw_ids())
    return (
        problem,
        theta,
        tree_map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, episodes),
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=str)
@pytest.mark.parametrize("entry", ENTRIES)
def test_meta_gradient_equals_a_loop_by_hand(entry: Entry, dtype: torch.dtype, tolerance: float) -> None:
    problem, theta, episodes = build_case(entry, dtype)
    found = compute_gradient(problem, theta, episodes, Execution("loop", 1)).double()
    with apply_numerics(1, False):
        expected = compute_by_hand(problem.model.module, problem.family.score, episodes, draw_ids())
    assert float(expected.norm()) > 0
    assert float((found - expected).norm() / expected.norm()) <= tolerance


PLAIN_AUTOGRAD = (
    "CheckpointedNet",
    "OwnFunctionNet",
    "PhysicsNet",
    "BranchingNet",
    "DropoutNet",
    "PackedNet",
)
"""Models that only the loop can run."""


@pytest.mark.parametrize("entry", ENTRIES)
def test_auto_settles_on_what_works(entry: Entry) -> None:
    problem, theta, episodes = build_case(entry, torch.float64)
    resolved = build_problem(build_job(entry))
    with apply_job_numerics(resolved.job, resolved.device):
        mode = resolve(resolved).execution.mode
    if entry.model.__name__ in PLAIN_AUTOGRAD:
        assert mode == "loop"
    elif mode == "vmap":
        loop = compute_gradient(problem, theta, episodes, Execution("loop", 1))
        vmap = compute_gradient(problem, theta, episodes, Execution("vmap", TASKS))
        assert float((loop - vmap).norm() / loop.norm()) <= 1e-9


def test_operation_without_a_second_derivative_is_refused_with_the_remedy() -> None:
    entry = Entry(BagNet, "tokens", "class")
    with pytest.raises(InputError, match=r"torch has no second derivative .*algorithm.first_order=true"):
        resolve(build_problem(build_job(entry)))
    first_order = Job.parse(build_job(entry).to_dict(), ["algorithm.first_order=true"])
    resolve(build_problem(first_order))


def compute_bits(text: str) -> bytes:
    """Return the bits of a step's gradient, as a worker computes them. Runs in this process or on a Ray worker."""
    problem = build_problem(Job.parse(json.loads(text)))
    with apply_job_numerics(problem.job, problem.device):
        problem = resolve(problem)
    theta = problem.init()
    episodes = draw_episodes(problem.family, "train", draw_ids())
    return compute_gradient(problem, theta, episodes, problem.execution).numpy().tobytes()


def test_two_workers_compute_the_same_bits(cluster: None) -> None:
    import ray

    folder = str(Path(__file__).parent)
    texts = {
        name_entry(entry): json.dumps(build_job(entry).to_dict())
        for entry in ZOO
        if entry.model not in HUGGING_FACE
    }

    @ray.remote(num_cpus=1, runtime_env={"env_vars": {"PYTHONPATH": f"{folder}:{distmeta_path()}"}})
    def compute_remotely(texts: dict[str, str]) -> dict[str, bytes]:
        import test_zoo

        return {name: test_zoo.compute_bits(text) for name, text in texts.items()}

    names = list(texts)
    halves = [{name: texts[name] for name in names[i::2]} for i in range(2)]
    results = ray.get([compute_remotely.remote(half) for half in halves], timeout=300)
    found = results[0] | results[1]
    differing = [name for name in names if found[name] != compute_bits(texts[name])]
    assert differing == []


def distmeta_path() -> str:
    tests = Path(__file__).parents[1]
    return f"{tests}:{tests.parent}"


TRAINED = [entry for entry in ZOO if entry.model.__name__ in ("PackedNet", "GraphNet", "DropoutNet")]


@pytest.mark.parametrize("entry", TRAINED, ids=name_entry)
@pytest.mark.slow
def test_training_gives_the_same_bits_with_two_workers(
    entry: Entry, workplace: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent)  # workers import the zoo from there
    found = []
    for workers in (0, 2):
        job = build_job(entry, steps=2, workers=workers, shards=2).replace()
        run = distmeta.train(Job.parse(job.to_dict() | {"output": str(workplace)})).run
        found.append(checkpoints.load(run).theta)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
