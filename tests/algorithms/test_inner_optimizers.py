"""Inner optimizers, compared with torch.optim and TorchOpt, and the parameters that they change."""

from __future__ import annotations

import pytest
import torch
from conftest import tree
from torch import nn

from distmeta.compute.execution import Execution, shard_gradient
from distmeta.compute.gradient import unroll
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.protocols import Batch
from distmeta.runtime.problem import build_problem
from distmeta.seeding import task_ids

LOOP = Execution("loop", 1)
TORCH = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.8),
    "adam": lambda p, lr: torch.optim.Adam(p, lr=lr, betas=(0.7, 0.95), eps=1e-3),
}


def build_setting(name: str, steps: int = 6, **options):
    algorithm = {"type": "maml", "inner_lr": 0.03, "inner_steps": steps, "inner_optimizer": name, **options}
    if name == "adam":
        algorithm |= {"betas": [0.7, 0.95], "eps": 1e-3}
    if name == "momentum":
        algorithm |= {"momentum": 0.8}
    problem = build_problem(Job.parse(tree(algorithm)))
    theta = {key: value.double() for key, value in problem.init().items()}
    problem.model.to(dtype=torch.float64)
    ids = task_ids(0, "train", 0, 3)
    support, query = problem.family.draw("train", ids)
    double = [Batch(b.x.double(), b.y.double()) for b in (support, query)]
    return problem, theta, type(problem.family.draw("train", ids))(*double), ids


@pytest.mark.parametrize("name", TORCH)
def test_trajectory_equals_torch_optim(name: str) -> None:
    problem, theta, episodes, _ = build_setting(name)
    support = Batch(episodes.support.x[0], episodes.support.y[0])
    state = unroll(problem.algorithm, theta, support, detach=True)
    module = problem.model.module
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            parameter.copy_(theta["model." + key])
    optimizer = TORCH[name](module.parameters(), 0.03)
    for _ in range(6):
        optimizer.zero_grad()
        nn.functional.mse_loss(module(support.x), support.y).backward()
        optimizer.step()
    for key, parameter in module.named_parameters():
        torch.testing.assert_close(state.phi["model." + key], parameter.detach(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", TORCH)
def test_meta_gradient_goes_through_the_optimizer_state(name: str) -> None:
    """Finite differences of the query loss after six steps, float64."""
    problem, theta, episodes, ids = build_setting(name)
    algorithm = problem.algorithm
    score = problem.score("train")
    generator = torch.Generator().manual_seed(0)
    direction = {k: torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in theta.items()}

    def total(h: float) -> float:
        moved = {k: v + h * direction[k] for k, v in theta.items()}
        metrics = shard_gradient(algorithm, score, moved, episodes, ids, LOOP).metrics
        return float(metrics["loss_after"].sum())

    gradient = shard_gradient(algorithm, score, theta, episodes, ids, LOOP).gradient
    exact = sum(float((gradient[k] * direction[k]).sum()) for k in theta)
    assert (total(1e-6) - total(-1e-6)) / 2e-6 == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("execution", [LOOP, Execution("vmap", 2**31)])
def test_adam_with_zero_gradients_has_no_nan(execution: Execution) -> None:
    """Dead units have gradient 0, so √s is at 0, where its derivative is infinite."""
    job = tree({"type": "maml", "inner_lr": 0.01, "inner_steps": 3, "inner_optimizer": "adam"})
    job["model"] = {"type": "mlp", "hidden": [16], "activation": "relu"}
    problem = build_problem(Job.parse(job))
    theta = problem.init()
    theta["model.1.bias"] = torch.where(torch.arange(16) < 8, -100.0, 0.1)  # half of the units are dead
    ids = task_ids(0, "train", 0, 4)
    episodes = problem.family.draw("train", ids)
    result = shard_gradient(problem.algorithm, problem.score("train"), theta, episodes, ids, execution)
    assert result.tasks == 4
    assert all(bool(torch.isfinite(value).all()) for value in result.gradient.values())
    assert bool((result.gradient["model.1.weight"][:8] == 0).all())
    assert bool((result.gradient["model.1.weight"][8:] != 0).any())


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_meta_gradient_equals_torchopt(name: str) -> None:
    import torchopt

    problem, theta, episodes, ids = build_setting(name)
    ours = shard_gradient(problem.algorithm, problem.score("train"), theta, episodes, ids, LOOP).gradient
    module = problem.model.module
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            parameter.copy_(theta["model." + key])
    if name == "momentum":
        optimizer = torchopt.MetaSGD(module, lr=0.03, momentum=0.8)
    else:
        optimizer = torchopt.MetaAdam(module, lr=0.03, betas=(0.7, 0.95), eps=1e-3)
    start = [torchopt.extract_state_dict(part, by="reference") for part in (module, optimizer)]
    parameters = dict(module.named_parameters())
    for t in range(3):
        for _ in range(6):
            optimizer.step(nn.functional.mse_loss(module(episodes.support.x[t]), episodes.support.y[t]))
        nn.functional.mse_loss(module(episodes.query.x[t]), episodes.query.y[t]).backward()
        for part, state in zip((module, optimizer), start, strict=True):
            torchopt.recover_state_dict(part, state)
    theirs = torch.cat([p.grad.flatten() for p in parameters.values()])
    own = torch.cat([ours["model." + key].flatten() for key in parameters])
    # torchopt keeps the bias corrections of Adam in float32
    assert float((own - theirs).norm() / theirs.norm()) <= (1e-6 if name == "adam" else 1e-10)


@pytest.mark.parametrize(("adapt", "layers"), [("head", {"5"}), ("body", {"1", "3"}), ("3.*", {"3"})])
def test_inner_loop_changes_only_the_selected_parameters(adapt: str, layers: set[str]) -> None:
    problem, theta, episodes, _ = build_setting("sgd", adapt=adapt)
    support = Batch(episodes.support.x[0], episodes.support.y[0])
    phi = unroll(problem.algorithm, theta, support, detach=True).phi
    changed = {key.split(".")[1] for key in phi if not torch.equal(phi[key], theta[key])}
    assert changed == layers


def test_adapt_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(InputError, match=r"algorithm\.adapt: got 'haed', which matches no parameter"):
        build_setting("sgd", adapt="haed")
